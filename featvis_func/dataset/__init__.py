"""Image data sets: their statistics, and the images that activate each filter, or each member of a family, most."""

from featvis_func.dataset.key import check_searchable as check_searchable
from featvis_func.dataset.key import examples_key as examples_key
from featvis_func.dataset.record import Example as Example
from featvis_func.dataset.record import Examples as Examples
from featvis_func.dataset.record import LayerExamples as LayerExamples
from featvis_func.dataset.search import top_examples as top_examples
