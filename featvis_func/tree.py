"""Pytrees: nested tuples, lists and dicts of tensors.

PyTorch's own functions for them live in a private module; this is the one file that imports it.
"""

from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_structure, tree_unflatten

__all__ = ["tree_flatten", "tree_leaves", "tree_map", "tree_structure", "tree_unflatten"]
