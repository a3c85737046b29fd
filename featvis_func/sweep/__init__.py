"""Whole layers and networks into a folder, resumable, on one machine or many: :func:`sweep`, :func:`open_store`."""

from featvis_func.sweep.checks import Status as Status
from featvis_func.sweep.checks import validate as validate
from featvis_func.sweep.engines import ENGINES as ENGINES
from featvis_func.sweep.engines import TooManyFailedError as TooManyFailedError
from featvis_func.sweep.engines import rank_of as rank_of
from featvis_func.sweep.reading import Entry as Entry
from featvis_func.sweep.reading import Store as Store
from featvis_func.sweep.reading import open_store as open_store
from featvis_func.sweep.running import DryRun as DryRun
from featvis_func.sweep.running import dry_run as dry_run
from featvis_func.sweep.running import sweep as sweep
