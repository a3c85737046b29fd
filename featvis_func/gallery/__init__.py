"""Static website of a network's feature visualisations: :func:`build_gallery`."""

from featvis_func.gallery.build import Gallery as Gallery
from featvis_func.gallery.build import build_gallery as build_gallery
from featvis_func.gallery.site import check_place as check_place
from featvis_func.gallery.source import source_of as source_of
