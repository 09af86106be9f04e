"""Pieces of the report page: escaped HTML, charts as inline SVG, pictures as data URIs, the page around them."""
