"""A page to look at sections with: deep zoom of the slide, spots over it, measured and predicted side by side.

One page (`static/`: plain ES modules, no build step) in two places: served to this machine alone, or copied into a
folder that any web server can serve. Both give it the same files under the same names (:mod:`hifusion.viewer.content`).
"""

from hifusion.viewer.showing import view

__all__ = ["view"]
