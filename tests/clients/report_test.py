"""The report of `lockstep bench serve` as a browser shows it: plots that are drawn and can be read, on
a wide and on a narrow screen, light and dark; nothing is asked of the network, nothing complained of.

    report_test.py BUILD_DIR
"""

import json
import tempfile
from pathlib import Path

import browser
import harness

RATES = (20, 40, 60, 80, 100, 120, 140, 160)
AT_ONCE = (1, 2, 4, 8)
REQUESTS = 12

# What is measured of every plot, in pixels of the screen.
PLOTS = """
const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
return [...document.querySelectorAll('svg.plot')].map(svg => ({
  title: svg.querySelector('.title').textContent,
  box: box(svg),
  texts: [...svg.querySelectorAll('text')].map(t => [t.textContent, box(t), getComputedStyle(t).fill]),
  grid: [...svg.querySelectorAll('.grid')].map(box),
  dots: svg.querySelectorAll('circle title').length,
  lines: [...svg.querySelectorAll('polyline')].map(l => ({
    box: box(l), length: l.getTotalLength(), points: l.points.numberOfItems,
    look: getComputedStyle(l).stroke + getComputedStyle(l).strokeDasharray })),
  ground: getComputedStyle(svg).backgroundColor })); """


def luminance(colour):
    """Of `rgb(r, g, b)`, as contrast is reckoned."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def within(inner, outer, by=1.5):
    return (inner[0] >= outer[0] - by and inner[1] >= outer[1] - by
            and inner[2] <= outer[2] + by and inner[3] <= outer[3] + by)  # fmt: skip


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def check_plot(plot):
    title = plot["title"]
    field = [min(g[0] for g in plot["grid"]), min(g[1] for g in plot["grid"]),
             max(g[2] for g in plot["grid"]), max(g[3] for g in plot["grid"])]  # fmt: skip
    assert field[3] - field[1] > 80, (title, "is no plot of any height", field)
    assert plot["lines"] and plot["dots"] >= sum(line["points"] for line in plot["lines"]), title
    for line in plot["lines"]:
        assert line["points"] >= 2 and line["length"] > 10, (title, line)
        assert within(line["box"], field), (title, "leaves its field", line["box"], field)
        assert not line["look"].startswith("none"), (title, "has a line that nobody sees")
    looks = [line["look"] for line in plot["lines"]]
    assert len(set(looks)) == len(looks), (title, "has two lines that look alike", looks)
    for i, (text, box, colour) in enumerate(plot["texts"]):
        assert within(box, plot["box"]), (title, f"cuts off {text!r}", box, plot["box"])
        assert contrast(colour, plot["ground"]) >= 4.5, (title, text, colour, plot["ground"])
        inside = [edge + by for edge, by in zip(field, (1, 1, -1, -1))]
        assert not overlap(box, inside), (title, f"{text!r} stands in the plot", box, field)
        for other, other_box, _ in plot["texts"][:i]:
            shrunk = [other_box[0] + 1, other_box[1] + 3, other_box[2] - 1, other_box[3] - 3]
            assert not overlap(box, shrunk), (title, f"{text!r} and {other!r} overlap")


def main():
    with tempfile.TemporaryDirectory(prefix="lockstep-report-") as folder, browser.Browser() as page:
        html, figures = Path(folder) / "report.html", Path(folder) / "report.json"
        with harness.Server("--max-num-seqs", 16, workers=1) as server:
            harness.run(
                harness.build_folder() / "bin" / "lockstep", "bench", "serve", "--server", server.target,
                "--request-rate", ",".join(map(str, RATES)), "--concurrency", ",".join(map(str, AT_ONCE)),
                "--requests", REQUESTS, "--input-len", 16, "--output-len", 16,
                "--html", html, "--output", figures,
            )  # fmt: skip
        points = json.loads(figures.read_text())["points"]
        assert len(points) == len(RATES) + len(AT_ONCE), len(points)

        for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
            page.shape(width, scheme)
            page.open(html.as_uri())
            assert page.value("return document.title") == "Lockstep under load"
            rows = page.value("return [...document.querySelectorAll('td:first-child')].map(d => d.textContent)")
            assert rows == [point["load"] for point in points], rows
            wide = page.value("return document.scrollingElement.scrollWidth")
            assert wide <= width, f"the page is {wide} wide on a screen of {width}"
            plots = page.value(PLOTS)
            assert len(plots) == 12, [plot["title"] for plot in plots]
            for plot in plots:
                check_plot(plot)
            grounds = {plot["ground"] for plot in plots}
            assert all((luminance(ground) < 0.2) == (scheme == "dark") for ground in grounds), grounds
            for plot in plots[8:]:
                assert len(plot["lines"]) == len(points), plot["title"]
        assert page.asked == [html.as_uri()] * 4, page.asked
        assert page.complaints == [], page.complaints
    print(f"report: {len(plots)} plots of {len(points)} loads, drawn and legible at both widths and schemes")


if __name__ == "__main__":
    main()
