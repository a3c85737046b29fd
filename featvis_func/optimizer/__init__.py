"""Gradient ascent rules as pure functions that compose.

>>> import torch
>>> rule = chain(normalize_gradient(), add_noise(1e-6), clip_norm(0.1), adam(0.05))
>>> params = torch.zeros(3)
>>> state = rule.init(params, torch.tensor([0, 1]))
>>> updates, state = rule.update(torch.tensor([1.0, -1.0, 2.0]), state, params)
>>> [round(u, 3) for u in updates.tolist()]
[0.05, -0.05, 0.05]

Rules see the parameters of one filter, so that under ``vmap`` every norm is computed per filter.
"""

from featvis_func.optimizer.adaptive import AdamState as AdamState
from featvis_func.optimizer.adaptive import NadamState as NadamState
from featvis_func.optimizer.adaptive import adam as adam
from featvis_func.optimizer.adaptive import adamw as adamw
from featvis_func.optimizer.adaptive import nadam as nadam
from featvis_func.optimizer.averaging import AverageState as AverageState
from featvis_func.optimizer.averaging import average_iterates as average_iterates
from featvis_func.optimizer.compose import chain as chain
from featvis_func.optimizer.gradients import NoiseState as NoiseState
from featvis_func.optimizer.gradients import add_drift as add_drift
from featvis_func.optimizer.gradients import add_noise as add_noise
from featvis_func.optimizer.gradients import clip_norm as clip_norm
from featvis_func.optimizer.gradients import global_norm as global_norm
from featvis_func.optimizer.gradients import normalize_gradient as normalize_gradient
from featvis_func.optimizer.gradients import normalize_groups as normalize_groups
from featvis_func.optimizer.gradients import pull_to_start as pull_to_start
from featvis_func.optimizer.momentum import SgdState as SgdState
from featvis_func.optimizer.momentum import sgd as sgd
from featvis_func.optimizer.schedules import Schedule as Schedule
from featvis_func.optimizer.schedules import constant as constant
from featvis_func.optimizer.schedules import cosine_decay as cosine_decay
from featvis_func.optimizer.schedules import exponential_decay as exponential_decay
from featvis_func.optimizer.schedules import linear_decay as linear_decay
from featvis_func.optimizer.schedules import piecewise as piecewise
from featvis_func.optimizer.schedules import warmup as warmup
