"""How a folder of the family pixels is recognised; imports no torch."""

from dmdr_models.folder.layout import Layout

PIXELS = Layout(name="pixels", parts={"network": ("PixelNetwork",)}, opens="pixel_plugins.family:Pixels")
