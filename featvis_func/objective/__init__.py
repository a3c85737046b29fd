"""Objectives: what an image is optimised to maximise, as a function from activations to one number.

An :class:`Objective` receives the activations of one image and that image's target, which is the filter number.
Objectives can be added, subtracted and multiplied by numbers; each term names its own layer, so that a sum may combine
several layers.

>>> objective = channel("layer3.1.conv2") - 0.5 * channel("layer2.0.conv1", 7)
>>> objective
channel('layer3.1.conv2') - 0.5 * channel('layer2.0.conv1', 7)
>>> objective.layers
('layer3.1.conv2', 'layer2.0.conv1')
"""

from featvis_func.objective.base import IMAGE as IMAGE
from featvis_func.objective.base import PICTURE as PICTURE
from featvis_func.objective.base import Family as Family
from featvis_func.objective.base import Objective as Objective
from featvis_func.objective.base import feature_axis as feature_axis
from featvis_func.objective.content import activation_difference as activation_difference
from featvis_func.objective.content import caricature as caricature
from featvis_func.objective.content import departure as departure
from featvis_func.objective.content import inversion as inversion
from featvis_func.objective.content import style as style
from featvis_func.objective.dictionaries import directions as directions
from featvis_func.objective.dictionaries import sae as sae
from featvis_func.objective.directions import channel_weights as channel_weights
from featvis_func.objective.directions import direction as direction
from featvis_func.objective.directions import direction_neuron as direction_neuron
from featvis_func.objective.families import facets as facets
from featvis_func.objective.families import family as family
from featvis_func.objective.families import logits as logits
from featvis_func.objective.families import member as member
from featvis_func.objective.families import neurons as neurons
from featvis_func.objective.penalties import blur as blur
from featvis_func.objective.penalties import boundary_complexity as boundary_complexity
from featvis_func.objective.penalties import l1 as l1
from featvis_func.objective.penalties import l2 as l2
from featvis_func.objective.penalties import opacity as opacity
from featvis_func.objective.penalties import total_variation as total_variation
from featvis_func.objective.together import alignment as alignment
from featvis_func.objective.together import diversity as diversity
from featvis_func.objective.together import interpolate as interpolate
from featvis_func.objective.units import any_channel as any_channel
from featvis_func.objective.units import channel as channel
from featvis_func.objective.units import deepdream as deepdream
from featvis_func.objective.units import layer as layer
from featvis_func.objective.units import logit as logit
from featvis_func.objective.units import neuron as neuron
from featvis_func.objective.units import region as region
