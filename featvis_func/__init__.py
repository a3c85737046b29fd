"""Feature visualisation as pure functions: every filter of a layer, batched, compiled and reproducible."""

from featvis_func.features import Features as Features
from featvis_func.features import list_layers as list_layers
from featvis_func.features import make_features as make_features
from featvis_func.image import fourier as fourier
from featvis_func.image import pixel as pixel
from featvis_func.models import Model as Model
from featvis_func.models import load_model as load_model
from featvis_func.objective import Objective as Objective
from featvis_func.objective import channel as channel
from featvis_func.objective import layer as layer
from featvis_func.objective import neuron as neuron
from featvis_func.render import default_optimizer as default_optimizer
from featvis_func.render import filter_keys as filter_keys
from featvis_func.render import init_state as init_state
from featvis_func.render import make_step as make_step
from featvis_func.render import render as render
from featvis_func.render import run as run
from featvis_func.result import Result as Result
from featvis_func.transform import views as views
from featvis_func.types import Best as Best
from featvis_func.types import Image as Image
from featvis_func.types import Info as Info
from featvis_func.types import Optimizer as Optimizer
from featvis_func.types import State as State
from featvis_func.types import Transform as Transform
