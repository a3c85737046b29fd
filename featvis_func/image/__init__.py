"""Parameterisations: which tensors stand for an image.

Each factory returns an :class:`~featvis_func.Image` of pure functions for one image: ``init(key)`` draws
parameters, ``decode(params)`` maps any finite parameters (up to 1e30) into the valid range ``[0, 1]``. All are scaled
so
that the default optimiser suits them: its steps go as far in the picture, whichever the parameters are.

A :class:`Canvas` is what comes before colour and range: :func:`shared` adds two, and :func:`bounded` makes an image of
one.

>>> import torch
>>> image = bounded(fourier_canvas(8, channels=1))
>>> image.decode(image.init(torch.tensor([0, 1]))).shape
torch.Size([1, 8, 8])
"""

from featvis_func.image.base import Canvas as Canvas
from featvis_func.image.base import bounded as bounded
from featvis_func.image.maco import magnitude_of as magnitude_of
from featvis_func.image.maco import phase as phase
from featvis_func.image.network import cppn as cppn
from featvis_func.image.sharing import shared as shared
from featvis_func.image.spatial import laplacian_pyramid as laplacian_pyramid
from featvis_func.image.spatial import pixel as pixel
from featvis_func.image.spatial import pixel_canvas as pixel_canvas
from featvis_func.image.spatial import pyramid_canvas as pyramid_canvas
from featvis_func.image.spectral import alpha as alpha
from featvis_func.image.spectral import fourier as fourier
from featvis_func.image.spectral import fourier_canvas as fourier_canvas
from featvis_func.image.start import from_image as from_image
from featvis_func.validation import check_size

image_size = check_size
