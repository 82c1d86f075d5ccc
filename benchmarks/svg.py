"""What the benchmarks' pictures have in common: a page that follows the reader's light or dark, and keys of lines."""

from collections.abc import Mapping, Sequence

Colours = Mapping[str, tuple[str, str, str]]  # of a line's class: on light, on dark, dashes


def page(size: tuple[float, float], title: tuple[float, str], colours: Colours, parts: Sequence[str]) -> str:
    """An SVG of this width and height; the title begins at its x."""
    width, height = size
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    )
    back = f'<rect class="back" width="{width}" height="{height}"/>'
    told = f'<text x="{title[0]}" y="22" font-size="15">{title[1]}</text>'
    return "\n".join([head, style(colours), back, told, *parts]) + "\n</svg>\n"


def style(colours: Colours) -> str:
    """Colours of both themes."""
    light = [".back{fill:#fff}text{fill:#222}.grid{stroke:#ddd}polyline,.key{fill:none;stroke-width:2}"]
    dark = [".back{fill:#0d1117}text{fill:#e6edf3}.grid{stroke:#30363d}"]
    for name, (on_light, on_dark, dashes) in colours.items():
        light.append(f".{name}{{stroke:{on_light};stroke-dasharray:{dashes or 'none'}}}")
        dark.append(f".{name}{{stroke:{on_dark}}}")
    return f"<style>{''.join(light)}@media(prefers-color-scheme:dark){{{''.join(dark)}}}</style>"


def key(name: str, text: str, x: float, y: float) -> list[str]:
    """A piece of a line with what it is."""
    return [
        f'<line class="key {name}" x1="{x}" y1="{y - 4}" x2="{x + 34}" y2="{y - 4}"/>',
        f'<text x="{x + 42}" y="{y}">{text}</text>',
    ]
