"""The page of `dmdr-generate serve`, built with Gradio (`dmdr-models[serve]`)."""

import html
import os
import sys
from typing import Any

from dmdr_models.base.errors import UsageError
from dmdr_models.studio import Studio

LOOPBACK = ("127.0.0.1", "::1", "localhost")
STYLE = """
.picture img { object-fit: contain; } /* a small picture fills its place, too */
.refused { margin: 0; padding: 10px 14px; border-left: 4px solid #c0262d; background: var(--background-fill-secondary);
  color: var(--body-text-color); overflow-wrap: anywhere; }
"""


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
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, css=STYLE,
            footer_links=["api", "settings"],
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error}; give another port or address") from error
    print(f"The page is at {page.local_url} until Ctrl-C", flush=True)
    page.block_thread()


def build(studio: Studio) -> Any:
    """The page: fields on the left, a picture for each model on the right."""
    import gradio

    with gradio.Blocks(title="dmdr", analytics_enabled=False) as page:
        gradio.Markdown("# dmdr")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                text, button, refused, numbers = _fields(gradio, studio)
            with gradio.Column(scale=3), gradio.Row():
                outputs = []
                for side in studio.sides:
                    with gradio.Column(min_width=240):
                        outputs += _picture(gradio, side.name)

        def begin() -> Any:
            return gradio.Button("Drawing…", interactive=False)

        def end() -> Any:
            return gradio.Button("Draw", interactive=True)

        def answer(text: str, seed: float, size: float, *steps: float) -> list[Any]:
            return _answer(gradio, studio, text or "", seed, size, steps)

        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        pressed = gradio.on([button.click, text.submit], begin, None, button, **quick)
        drawn = pressed.then(
            answer, [text, *numbers], [*outputs, refused], api_name="draw", show_progress_on=outputs[::2]
        )
        drawn.then(end, None, button, **quick)
        drawn.failure(end, None, button, **quick)  # such as a full queue
    return page


def _fields(gradio: Any, studio: Studio) -> tuple[Any, Any, Any, list[Any]]:
    """The prompt, the button, the place for a refusal, and the numbers: seed, size and the steps of each model.

    Seed and size have no limits of their own: Gradio would refuse them in other words, and would cut a long text.
    """
    limits, sides = studio.limits, studio.sides
    label = "Prompt" if studio.takes == "texts" else "Class label"
    text = gradio.Textbox(label=label, lines=3 if studio.takes == "texts" else 1, max_lines=8, autofocus=True)
    button = gradio.Button("Draw", variant="primary")
    refused = gradio.HTML(visible=False, padding=False)
    steps = [
        gradio.Slider(1, limits.steps, min(side.steps, limits.steps), step=1, label=f"Steps of the {side.name}")
        for side in sides
    ]
    seed = gradio.Number(0, label="Seed", precision=0)
    size = gradio.Number(
        0,
        label="Side in pixels",
        info=f"16 to {limits.side}; 0 is the model's own",
        precision=0,
        visible=all(side.sized for side in sides),
    )
    return text, button, refused, [seed, size, *steps]


def _picture(gradio: Any, name: str) -> list[Any]:
    """The place of a model's picture, and of the line under it."""
    buttons = ["download", "fullscreen"]  # without the one that shares the picture on another server
    picture = gradio.Image(
        label=name, format="png", height=400, interactive=False, buttons=buttons, elem_classes="picture"
    )
    line = gradio.Textbox(
        label=f"About the picture of the {name}", show_label=False, container=False, interactive=False, max_lines=8
    )
    return [picture, line]


def _answer(gradio: Any, studio: Studio, text: str, seed: Any, size: Any, steps: Any) -> list[Any]:
    """New values of all pictures, of the lines under them, and of the refusal; what is refused leaves the pictures."""
    try:
        found = studio.answer(text, _whole(seed), [_whole(each) for each in steps], _whole(size))
    except UsageError as error:
        said = f'<p class="refused" role="alert">{html.escape(str(error))}</p>'
        return [gradio.skip() for _ in studio.sides for _ in range(2)] + [gradio.HTML(said, visible=True)]
    pairs = zip(studio.sides, found, strict=True)
    shown = [
        part
        for side, (picture, line) in pairs
        for part in (gradio.Image(picture, alt_text=f"Picture of the {side.name}: {text.strip()}"), line)
    ]
    return [*shown, gradio.HTML("", visible=False)]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
