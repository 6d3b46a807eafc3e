"""Draw what a request costs as bars that read on a light and on a dark page."""

from pathlib import Path

WIDTH, LABELS, BAR, STEP = 380, 66, 16, 20  # of a panel, its names, a bar, from bar to bar
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.head { font-weight: 600 }
rect { fill: #9aa4ae }
rect.ours { fill: #00897b }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
rect { fill: #6e7883 }
rect.ours { fill: #26b5a4 }
}
"""


def draw(panels: dict[str, dict[str, float]], file: Path) -> None:
    """Draw a panel for each operation, with a bar for the CPU seconds of each contender."""
    title = "CPU time of the server per request, in µs: shorter is better"
    height = 40 + STEP * max(map(len, panels.values()))
    rows = (len(panels) + 1) // 2
    shapes = [f'<text class="head" x="0" y="14">{title}</text>']
    for number, (operation, bars) in enumerate(panels.items()):
        left, top = number % 2 * WIDTH, 44 + number // 2 * height
        shapes.append(f'<text class="head" x="{left}" y="{top}">{operation}</text>')
        longest = max(bars.values())
        for place, (name, seconds) in enumerate(bars.items()):
            y = top + 8 + place * STEP
            length = seconds / longest * (WIDTH - LABELS - 64)
            end, base = left + LABELS + length + 6, y + 13
            shapes += [
                f'<text x="{left}" y="{base}">{name}</text>',
                f'<rect class="{name}" x="{left + LABELS}" y="{y}" width="{length:.1f}"'
                f' height="{BAR}" rx="2"/>',
                f'<text x="{end:.1f}" y="{base}">{seconds * 1e6:.0f}</text>',
            ]
    size = f'viewBox="0 0 {2 * WIDTH} {24 + rows * height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">'
    file.write_text("\n".join([head, f"<style>{STYLE}</style>", *shapes, "</svg>", ""]))
