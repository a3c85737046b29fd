"""Models by name, from a folder or from the user: an ``nn.Module`` with what it expects as input."""

from featvis_func.models.base import IMAGENET_MEAN as IMAGENET_MEAN
from featvis_func.models.base import IMAGENET_STD as IMAGENET_STD
from featvis_func.models.base import Model as Model
from featvis_func.models.base import fingerprint as fingerprint
from featvis_func.models.loading import load_model as load_model
