"""The folder of a SiT: a SiTTransformer and a VAE."""

from dmdr_models.folder.layout import VAES, Layout

LAYOUT = Layout(
    name="sit",
    parts={"transformer": ("SiTTransformer",), "vae": VAES},
    one_size=True,
    opens="dmdr_models.sit.family:SiT",
)
