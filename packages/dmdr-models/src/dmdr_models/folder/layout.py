"""How the folder of a model is recognised as one of a family, and where the family's code is. Imports no torch."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

from dmdr_models.base.json_files import first, read_json

VAES = ("AutoencoderKL", "AutoencoderTiny")
"""The classes that a family's part `vae` may have."""


@dataclass(frozen=True)
class Layout:
    """A model family before anything is loaded. An entry point of the group `dmdr_families` names one.

    The module that defines a Layout must import neither torch nor diffusers: `dmdr-generate --help` and the checks of a
    recipe import it. The code behind `opens` and `draws` is imported when it is used.

    Attributes:
        name: of the family, as in recipes; the entry point has the same name.
        parts: the sub-folders of a model, the network first, each with the names of the classes that its config.json
            may name; an empty tuple accepts any class. Text encoders are called `text_encoder…`, and their tokenizers
            lie in `tokenizer…`.
        opens: "module:Class" of the latent model, see `dmdr_models.families.protocols.Family`. It is called with the
            folder and with the options that the caller gives: `dtype`, and if it takes them `vae`, `resolution` and
            `max_tokens`.
        takes: what a picture is drawn of, class labels or texts.
        predicts: what the network predicts: the velocity of flow matching, or the noise of a variance-preserving
            process. The checks of a recipe read it.
        max_tokens: length of the longest sequence of a text unless a recipe says otherwise; None where the family
            leaves no choice.
        checks: "module:function" by part, for what the family demands of the part's config beyond its class. It is
            called with the config and raises a ValueError; importing it must not import torch.
        optional: the parts that a model may do without; its model_index.json says so by a null.
        reads_kohya: "module:function" that reads LoRAs in kohya's layout, for a network whose layout diffusers cannot
            convert. It is called with the file's tensors and the network's config, and returns by the name of each
            layer in diffusers its A, its B, and kohya's name of the layer, whose alpha they have.
        one_size: the network draws pictures of one size only, the `sample_size` of its config.
        draws: "module:factory" for `dmdr-generate`; it is called with this Layout and returns a
            `dmdr_models.drawing.interface.Drawing`. The default draws with `dmdr_models.sample`, for any family.
    """

    name: str
    parts: Mapping[str, tuple[str, ...]]
    opens: str
    takes: Literal["labels", "texts"] = "labels"
    predicts: Literal["velocity", "noise"] = "velocity"
    max_tokens: int | None = None
    optional: tuple[str, ...] = ()
    reads_kohya: str | None = None
    one_size: bool = False
    draws: str = "dmdr_models.drawing.own_sampler:OwnSampler"
    checks: Mapping[str, str] = field(default_factory=dict)

    @property
    def network_part(self) -> str:
        """The sub-folder of the network, such as "transformer"."""
        return next(iter(self.parts))

    @property
    def network_classes(self) -> tuple[str, ...]:
        return self.parts[self.network_part]

    @property
    def text_encoders(self) -> dict[str, tuple[str, ...]]:
        """The parts that are text encoders, in their order."""
        return {part: classes for part, classes in self.parts.items() if part.startswith("text_encoder")}

    def check_config(self, part: str, config: dict[str, Any]) -> None:
        """Check the config of one part with the family's own check, if it has one.

        Raises:
            ValueError: the family cannot use such a part.
        """
        if part in self.checks:
            resolve_name(self.checks[part])(config)

    def lacking(self, path: str | Path) -> tuple[str, ...]:
        """The optional parts without which the model in a local folder works; none for a hub name.

        Raises:
            ValueError: the folder's model_index.json is no pipeline's config.
        """
        index = Path(path) / "model_index.json"
        if not self.optional or not index.is_file():
            return ()
        try:
            named = read_json(index)
        except ValueError as error:
            raise ValueError(f"{index} is not a pipeline's config: {error}") from error
        return tuple(part for part in self.optional if first(named.get(part)) is None)

    def open(self, path: str | Path, **options: Any) -> Any:
        """Import the family's code and open a folder with it; see `dmdr_models.load`."""
        factory = resolve_name(self.opens)
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in inspect.signature(factory).parameters:
                raise ValueError(f"{name}: the family {self.name} has no such option; leave it out")
        return factory(path, **given)

    def drawing(self) -> Any:
        """How `dmdr-generate` draws with this family."""
        return resolve_name(self.draws)(self)
