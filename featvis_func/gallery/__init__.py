"""A static site to look through a network: :func:`build_gallery`."""

from featvis_func.gallery.build import Gallery as Gallery
from featvis_func.gallery.build import build_gallery as build_gallery
from featvis_func.gallery.build import check_place as check_place
