"""Render whole layers or networks into a folder: resumable, on one machine or many. Provides :func:`sweep` and
:func:`open_store`."""

from featvis_func.sweep.api import DryRun as DryRun
from featvis_func.sweep.api import dry_run as dry_run
from featvis_func.sweep.api import sweep as sweep
from featvis_func.sweep.launchers import ENGINES as ENGINES
from featvis_func.sweep.launchers import TooManyFailedError as TooManyFailedError
from featvis_func.sweep.launchers import rank_of as rank_of
from featvis_func.sweep.store import Entry as Entry
from featvis_func.sweep.store import Store as Store
from featvis_func.sweep.store import open_store as open_store
from featvis_func.sweep.validate import Status as Status
from featvis_func.sweep.validate import validate as validate
