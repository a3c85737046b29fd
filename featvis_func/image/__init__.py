"""Image parameterisations: functions from trainable tensors to an image.

Each factory returns an :class:`~featvis_func.Image`, a tuple of pure functions for one image: ``init(key)`` draws
initial parameters and ``decode(params)`` maps any finite parameters (up to 1e30) into the valid range ``[0, 1]``. All
parameterisations are scaled so that one learning rate suits them.

A :class:`Canvas` is an image before colour correlation and sigmoid. :func:`shared` adds two of them, and
:func:`bounded` turns one into an image.

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
