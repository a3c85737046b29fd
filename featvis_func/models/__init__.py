"""Load vision models: an ``nn.Module`` together with the input it expects."""

from featvis_func.models.base import IMAGENET_MEAN as IMAGENET_MEAN
from featvis_func.models.base import IMAGENET_STD as IMAGENET_STD
from featvis_func.models.base import Model as Model
from featvis_func.models.base import device_for as device_for
from featvis_func.models.base import fingerprint as fingerprint
from featvis_func.models.inputs import IMAGE_INPUT as IMAGE_INPUT
from featvis_func.models.loading import load_model as load_model
