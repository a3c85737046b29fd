"""Random image transforms, which keep the optimised image from being an adversarial pattern of pixels.

Geometric steps (:func:`jitter`, :func:`scale`, :func:`rotate`, :func:`flip`, :func:`crop`, ...) are matrices.
:func:`warp` multiplies any number of them into one and samples the image once, at the input size of the model.
:func:`chain` composes transforms; :func:`multiview` produces several randomly transformed copies of one image.
:func:`per_frame` applies them to the frames of a video; :func:`warp_time` shifts and stretches videos and signals.

>>> import torch
>>> transform = chain(warp(jitter(8), rotate(5), size=(224, 224)), normalize((0.5,) * 3, (0.25,) * 3))
>>> transform.apply(torch.rand(3, 100, 120), transform.draw(torch.tensor([0, 1]))).shape
torch.Size([3, 224, 224])
"""

from featvis_func.transform.affine import Affine as Affine
from featvis_func.transform.affine import flip as flip
from featvis_func.transform.affine import jitter as jitter
from featvis_func.transform.affine import pad as pad
from featvis_func.transform.affine import rotate as rotate
from featvis_func.transform.affine import scale as scale
from featvis_func.transform.backgrounds import BACKGROUNDS as BACKGROUNDS
from featvis_func.transform.backgrounds import over_background as over_background
from featvis_func.transform.colors import color_jitter as color_jitter
from featvis_func.transform.compose import chain as chain
from featvis_func.transform.compose import multiview as multiview
from featvis_func.transform.crops import box_crop as box_crop
from featvis_func.transform.crops import crop as crop
from featvis_func.transform.crops import crop_or_pad as crop_or_pad
from featvis_func.transform.noise import normal_noise as normal_noise
from featvis_func.transform.noise import uniform_noise as uniform_noise
from featvis_func.transform.pixels import gaussian_blur as gaussian_blur
from featvis_func.transform.pixels import normalize as normalize
from featvis_func.transform.pixels import roll as roll
from featvis_func.transform.sampling import warp as warp
from featvis_func.transform.temporal import per_frame as per_frame
from featvis_func.transform.temporal import warp_time as warp_time
