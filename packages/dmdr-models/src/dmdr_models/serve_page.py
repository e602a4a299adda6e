"""The page of `dmdr-generate serve`, built with Gradio (`dmdr-models[serve]`)."""

import os
import sys
from typing import Any

from dmdr_models.base.errors import UsageError
from dmdr_models.studio import Studio

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def launch(studio: Studio, host: str, port: int) -> None:
    """Answer requests until Ctrl-C.

    Raises:
        UsageError: the port is taken, or the address is not one of this machine.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    if host not in LOOPBACK:
        print(f"warning: everyone who reaches {host}:{port} can draw; the page has no accounts", file=sys.stderr)
    page = build(studio)
    page.queue(max_size=studio.limits.waiting, default_concurrency_limit=1)
    try:
        page.launch(server_name=host, server_port=port, share=False, quiet=False)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error}; give another port or address") from error


def build(studio: Studio) -> Any:
    """The page: fields on the left, a picture for each model on the right."""
    import gradio

    limits, sides = studio.limits, studio.sides

    def answer(text: str, seed: float, size: float, *steps: float) -> list[Any]:
        try:
            found = studio.answer(text or "", _whole(seed), [_whole(each) for each in steps], _whole(size))
        except UsageError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        return [part for picture, said in found for part in (picture, said)]

    with gradio.Blocks(title="dmdr", analytics_enabled=False) as page:
        gradio.Markdown("# dmdr")
        with gradio.Row():
            with gradio.Column(scale=1):
                label = "Prompt" if studio.takes == "texts" else "Class label"
                text = gradio.Textbox(label=label, lines=3, max_length=limits.letters, autofocus=True)
                button = gradio.Button("Draw", variant="primary")
                steps = [
                    gradio.Slider(
                        1, limits.steps, min(side.steps, limits.steps), step=1, label=f"Steps of the {side.name}"
                    )
                    for side in sides
                ]
                seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
                size = gradio.Number(
                    0,
                    label="Side in pixels (0: the model's own)",
                    precision=0,
                    minimum=0,
                    maximum=limits.side,
                    visible=all(side.sized for side in sides),
                )
            with gradio.Column(scale=3), gradio.Row():
                outputs = []
                for side in sides:
                    with gradio.Column(min_width=200):
                        outputs.append(gradio.Image(label=side.name, format="png", interactive=False))
                        outputs.append(gradio.Textbox(show_label=False, container=False, interactive=False))
        gradio.on([button.click, text.submit], answer, [text, seed, size, *steps], outputs, api_name="draw")
    return page


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
