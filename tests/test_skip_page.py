"""The page holds the run's decisions, scores and ranks; no text in it is markup.

In a browser it decides again what the run decided.
"""

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import generate
from cli.skip_map import Decisions, write_skip_page
from filter_config import PRESETS, layer_ratios, preset
from golden import loop
from load_weights import load
from test_filter import small
from test_model import texts
from token_filter import exceeds_quantile, token_filter

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--",
    '"',
    "'\\",
    "\n",
    "\u2028",
    "🦊",
    "&lt;",
    "<img src=x onerror=alert(1)>",
    "]]>",
]
HOSTILE_91 = (HOSTILE * 10)[:91]


class Scripts(HTMLParser):
    """The contents of a page's script elements, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.scripts = []
        self.tags = []
        self.is_inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.is_inside = tag == "script"
        if self.is_inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.is_inside = False

    def handle_data(self, data):
        if self.is_inside:
            self.scripts[-1] += data


def parts_of(path):
    return Scripts(path.read_text(encoding="utf-8"))


def data_of(path):
    """The data that a page was given."""
    return json.loads(parts_of(path).scripts[0])


def write(
    path,
    name="paper",
    prune=0.5,
    T=90,
    pieces=None,
    filter_fn=token_filter,
    dtype=torch.float64,
    **overrides,
):
    """A page of T tokens through the small model of 4 layers, fed in two chunks and one by one.

    Returns its decisions, its filter and its data.
    """
    model = small()
    if dtype != torch.float64:
        model = copy.deepcopy(model).to(dtype)  # other tests share the small model
    filter = preset(name, prune=prune, **overrides)
    decisions = Decisions(1, 4)
    cache = model.new_cache(1, filter, filter_fn)
    for part in texts()[:1, :T].split([40, 20, *[1] * (T - 60)], dim=1):
        model(part, cache)
        decisions.watch([0], cache)
    if pieces is None:
        pieces = [f" {i}" for i in range(T + 1)]
    write_skip_page(path, f"{name}, prune {prune}", pieces, 70, decisions, filter)
    return decisions, filter, data_of(path)


def write_random(path, pieces, n_prompt, L=6, redundant=None, name="cache"):
    """A page of any text, with drawn scores, and decisions unless given: (L, T).

    Returns its address.
    """
    T = len(pieces)
    filter = preset(name, prune=0.5)
    if redundant is None:
        redundant = torch.rand(L, T) < 0.5
    decisions = Decisions(1, L)
    decisions.redundant = [redundant]
    decisions.score = [torch.rand(L, T).double()]
    n_sides = 3 if filter.needs_queries else 2
    decisions.cosine = [[[torch.rand(T, n_sides, 2).double()] for _ in range(L)]]
    decisions.mean = [[[torch.rand(T, n_sides).double()] for _ in range(L)]]
    decisions.w_k = [[[torch.rand(T).double()] for _ in range(L)]]
    write_skip_page(path, "title", pieces, n_prompt, decisions, filter)
    return f"file://{path}"


def loop_numbers(path):
    """Writes a page under `cache` and goes through its keys and queries with golden/loop.py.

    Returns the page's data and of each layer a list over tokens of what the loop has: c_k, c_q (of
    each head), mean_k, mean_q, place_k, place_q, score and redundant.
    """
    seen = [[] for _ in range(4)]  # of each layer the keys and queries of each token, (2, KVH, D)

    def watched(k, v, lengths, state, ratio, config, q=None):
        seen[int(state.layer)] += torch.stack((k[0], q[0]), dim=1)
        return token_filter(k, v, lengths, state, ratio, config, q)

    _, filter, data = write(path, "cache", filter_fn=watched)
    layers = []
    for tokens, ratio in zip(seen, data["ratios"]):
        past = SimpleNamespace(A_K=None, A_Q=None, c_k=[], c_q=[], scores=[])
        numbers = []
        for k, q in torch.stack(tokens).numpy():
            A_K = k if past.A_K is None else past.A_K  # as it is before the token
            A_Q = q if past.A_Q is None else past.A_Q
            redundant, score = loop.filter_token_by_queries(k, q, past, ratio, filter)
            number = SimpleNamespace(redundant=redundant, score=score)
            number.c_k = [loop.cosine(k[h], A_K[h]) for h in range(len(k))]
            number.c_q = [loop.cosine(k[h], A_Q[h]) for h in range(len(k))]
            number.mean_k = past.c_k[-1]
            number.mean_q = past.c_q[-1]
            number.place_k = loop.place(past.c_k[-1], past.c_k[:-1][-filter.history :])
            number.place_q = loop.place(past.c_q[-1], past.c_q[:-1][-filter.history :])
            numbers.append(number)
        layers.append(numbers)
    return data, layers


# ---------------------------------------------------------------------------------- the data

OF_VALUES = ("weight", "cosine_v")
OF_QUERIES = ("cosine_q", "place_k", "place_q")


@pytest.mark.parametrize("name", PRESETS)
def test_the_data_are_the_run_s(tmp_path, name):
    decisions, filter, data = write(tmp_path / "page.html", name)
    assert data["ratios"] == layer_ratios(filter, 4)
    assert (data["mode"], data["recent"]) == (filter.mode, filter.recent)
    assert (data["warmup"], data["history"]) == (16, 64)
    assert "1" in data["redundant"][2]
    for l, ratio in enumerate(data["ratios"]):
        flags = [int(digit) for digit in data["redundant"][l]]
        assert flags == decisions.redundant[0][l].tolist()
        if ratio == 0:
            for key in ("score", "cosine_k", *OF_VALUES, *OF_QUERIES):
                assert data[key][l] is None
            continue

        # The figures of one token go together.
        assert data["score"][l] == decisions.score[0][l].tolist()  # to the last bit
        score = torch.tensor(data["score"][l], dtype=torch.float64)
        if name == "cache":
            assert all(data[key][l] is None for key in OF_VALUES)
            assert score_of_places(data, l).tolist() == data["score"][l]
        else:
            assert all(data[key][l] is None for key in OF_QUERIES)
            weight = torch.tensor(data["weight"][l]).double()
            mean_k = torch.tensor(data["cosine_k"][l]).double().mean(1)
            mean_v = torch.tensor(data["cosine_v"][l]).double().mean(1)
            fused = weight * mean_k + (1 - weight) * mean_v
            torch.testing.assert_close(fused, score, rtol=0, atol=2e-4)

        # The scores say what was decided.
        for t in range(90):
            past = score[max(0, t - data["history"]) : t]
            n = torch.tensor([[len(past)]])
            exceeds = exceeds_quantile(score[None, t : t + 1], past[None, None], n, ratio)
            assert flags[t] == (t >= 16 and exceeds.item())


def score_of_places(data, l, dtype=torch.float64):
    """The score that a layer's places make, by the definition: (T,)."""
    place_k = torch.tensor(data["place_k"][l], dtype=dtype)
    place_q = torch.tensor(data["place_q"][l], dtype=dtype)
    n_past = torch.arange(len(place_k)).clamp(min=1, max=data["history"])
    return (place_k - place_q / 2) / n_past


def test_ranks_in_a_float32_model_are_those_that_made_its_scores(tmp_path):
    _, _, data = write(tmp_path / "page.html", "cache", dtype=torch.float32)
    for l in range(4):
        score = score_of_places(data, l, torch.float32)
        assert score.tolist() == data["score"][l]


def test_cosines_places_and_scores_with_queries_are_the_loop_s(tmp_path):
    data, layers = loop_numbers(tmp_path / "page.html")
    for l, numbers in enumerate(layers):
        assert "".join(str(int(number.redundant)) for number in numbers) == data["redundant"][l]
        for t, number in enumerate(numbers):
            assert data["cosine_k"][l][t] == pytest.approx(number.c_k, abs=6e-5)
            assert data["cosine_q"][l][t] == pytest.approx(number.c_q, abs=6e-5)
            assert data["place_k"][l][t] == number.place_k
            assert data["place_q"][l][t] == number.place_q
            assert data["score"][l][t] == number.score


def test_nothing_of_a_text_becomes_markup(tmp_path):
    plain = tmp_path / "plain.html"
    page = tmp_path / "page.html"
    write(plain)
    _, _, data = write(page, pieces=HOSTILE_91)
    assert data["pieces"] == HOSTILE_91
    assert parts_of(page).tags == parts_of(plain).tags
    own = page.read_text(encoding="utf-8").replace(parts_of(page).scripts[0], "")
    assert "onerror" not in own
    assert not re.search(r"(?:src|href)=|@import|url\(|fetch\(|innerHTML|document\.write", own)


def test_a_long_text_stays_small(tmp_path):
    write_random(tmp_path / "page.html", ["word"] * 2000, 1500, L=30)
    assert (tmp_path / "page.html").stat().st_size < 10_000_000


def test_the_command_writes_it(checkpoint, tmp_path):
    path = tmp_path / "page.html"
    text = "the quick brown fox </script> " * 4
    flags = f"--prune 0.5 --preset cache --max-new-tokens 5 --ignore-eos --skip-map {path}".split()
    generate.main([str(checkpoint), "--prompt", text, "--device", "cpu", *flags])
    data = data_of(path)
    _, tokenizer = load(checkpoint, "cpu")
    n_prompt = len(tokenizer.encode(text))
    assert data["prompt"] == n_prompt
    assert len(data["pieces"]) == n_prompt + 5
    assert len(data["redundant"][0]) == n_prompt + 4  # the last token is not fed
    assert "</script>" in "".join(data["pieces"])
    assert data["title"] == "cache, prune 0.5"


def test_it_says_what_marks_an_answer(tmp_path):
    write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.search(r"#text span\.answer \{[^}]*font-weight: 700[^}]*underline dotted", page)
    assert "The answer is bold, with a dotted line under it." in page


# ------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless=new no-sandbox disable-gpu disable-background-networking"
    flags += " disable-component-update no-first-run"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def messages(browser):
    """What the page has complained about since the last call."""
    return [entry["message"] for entry in browser.get_log("browser")]


def text_of(browser, id):
    return browser.find_element("id", id).text


def spans_of(browser):
    return browser.find_elements("css selector", "#text > span")


def decided(browser):
    """What the page has decided by now, as in its data."""
    return browser.execute_script("return decided.map(row => row.map(Number).join(''))")


def choose(browser, l, t):
    browser.execute_script("choose(arguments[0], arguments[1])", l, t)


def point_at(browser, element):
    script = "arguments[0].dispatchEvent(new MouseEvent('mouseenter'))"
    browser.execute_script(script, element)


def slide(browser, ratio):
    script = """
        const slider = document.getElementById("ratio");
        slider.value = arguments[0];
        slider.dispatchEvent(new Event("input"));"""
    browser.execute_script(script, ratio)


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_decides_as_the_run_did(browser, tmp_path, name):
    _, _, data = write(tmp_path / "page.html", name, pieces=HOSTILE_91)
    browser.get(f"file://{tmp_path / 'page.html'}")
    assert browser.title == f"Skip map: {data['title']}"
    assert decided(browser) == data["redundant"]
    assert len(spans_of(browser)) == 91
    assert not browser.find_elements("css selector", "#text img, #text script")
    for l, ratio in enumerate(data["ratios"]):
        choose(browser, l, 50)
        verdict = text_of(browser, "verdict")
        score = data["score"][l]
        if score is None:
            assert not browser.find_element("id", "ratio").is_enabled()
            assert "ratio is 0" in verdict
            continue
        below = sum(s < score[50] for s in score[:50])
        are = "is" if below == 1 else "are"
        needed = 50 - int(50 * ratio + 1e-9)
        assert f"{below} of the 50 scores before it {are} lower, {needed} would do" in verdict
        assert ("kept" in verdict) == (data["redundant"][l][50] == "0")
        assert text_of(browser, "sees").startswith("It sees ")

        slide(browser, 0)
        assert "1" not in decided(browser)[l]
        assert text_of(browser, "what-if").startswith("0 of this layer")
        slide(browser, 1)
        assert decided(browser)[l] == "0" * 16 + "1" * 74
        slide(browser, ratio)
        assert decided(browser)[l] == data["redundant"][l]
        slide(browser, 0.9)
        reset = browser.find_element("id", "reset")
        browser.execute_script("arguments[0].click()", reset)
        assert decided(browser) == data["redundant"]
    assert messages(browser) == []


def test_of_equal_scores_none_exceeds_another(browser, tmp_path):
    """Among 8 scores made of ranks many are equal: the page must neither part nor join them."""
    _, _, data = write(tmp_path / "page.html", "cache", history=8)
    browser.get(f"file://{tmp_path / 'page.html'}")
    n_ties = 0
    for l, ratio in enumerate(data["ratios"]):
        score = data["score"][l]
        for t in range(16, 90):
            threshold = sorted(score[t - 8 : t], reverse=True)[int(8 * ratio)]
            n_ties += score[t] == threshold
        choose(browser, l, 50)
        slide(browser, 0)
        assert "1" not in decided(browser)[l]
        slide(browser, ratio)
        assert decided(browser)[l] == data["redundant"][l]
    assert n_ties > 10
    assert messages(browser) == []


SHOWN = """
    const texts = (selector) => [...document.querySelectorAll(selector)].map(e => e.textContent);
    const rows = [...$("fusion").rows].map(row => [...row.cells].map(each => each.textContent));
    return [texts("#cosines span"), texts("#cosines b"), rows];"""


def test_numbers_with_queries_are_the_loop_s(browser, tmp_path):
    _, layers = loop_numbers(tmp_path / "page.html")
    browser.get(f"file://{tmp_path / 'page.html'}")
    for l, numbers in enumerate(layers):
        for t in (0, 1, 20, 63, 64, 89):
            number = numbers[t]
            choose(browser, l, t)
            names, cosines, rows = browser.execute_script(SHOWN)
            assert names == ["key, head 0", "key, head 1", "query, head 0", "query, head 1"]
            shown = [float(text) for text in cosines]
            assert shown == pytest.approx([*number.c_k, *number.c_q], abs=6e-4)

            n = min(t, 64)
            rank_k = number.place_k / max(n, 1)
            rank_q = number.place_q / max(n, 1)
            assert [row[0] for row in rows] == ["", "mean", "lower before it", "rank", "score"]
            assert rows[0][1:] == ["key", "query"]
            means = [float(text) for text in rows[1][1:]]
            assert means == pytest.approx([number.mean_k, number.mean_q], abs=6e-4)
            assert rows[2][1:] == [f"{number.place_k:g} of {n}", f"{number.place_q:g} of {n}"]
            ranks = [float(text) for text in rows[3][1:]]
            assert ranks == pytest.approx([rank_k, rank_q], abs=6e-4)
            assert float(rows[4][1]) == pytest.approx(rank_k - rank_q / 2, abs=6e-4)
            assert "half the query's" in text_of(browser, "explained")
    assert messages(browser) == []


def test_numbers_with_values_have_a_weight_and_no_ranks(browser, tmp_path):
    browser.get(write_random(tmp_path / "page.html", [" a"] * 60, 40, name="local"))
    choose(browser, 3, 50)
    names, _, rows = browser.execute_script(SHOWN)
    assert names == ["key, head 0", "key, head 1", "value, head 0", "value, head 1"]
    assert [row[0] for row in rows] == ["", "mean", "variance", "weight", "score"]
    assert rows[0][1:] == ["key", "value"]
    assert text_of(browser, "explained") == ""


def test_mouse_and_keys_choose_a_token(browser, tmp_path):
    _, _, data = write(tmp_path / "page.html")
    browser.get(f"file://{tmp_path / 'page.html'}")
    layer, token = browser.execute_script("return [layer, token]")
    assert data["redundant"][layer][token] == "1"
    assert text_of(browser, "where").startswith(f"Token {token}, ")

    spans = spans_of(browser)
    point_at(browser, spans[20])
    assert text_of(browser, "where").startswith("Token 20, ")
    before = text_of(browser, "verdict")
    browser.execute_script("arguments[0].click()", spans[60])
    point_at(browser, spans[20])  # a click holds the choice
    assert text_of(browser, "where").startswith("Token 60, ")
    assert text_of(browser, "verdict") != before
    for id, token in (("scroll", 59), ("text", 58)):
        browser.find_element("id", id).send_keys("\ue012")  # the left arrow
        assert text_of(browser, "where").startswith(f"Token {token}, ")
    assert messages(browser) == []


OPENING = [
    *["x"] * 16,
    "<|im_start|>", "user", "\n", "The", " quick", ",", " sleep", "ing", " dogs", " are", ".",
    " Answer", " here",
]  # fmt: skip


@pytest.mark.parametrize("n_redundant, chosen", [
    # Not a role, a sign, a part of a word or a word of the answer.
    ({17: 6, 20: 3, 21: 6, 22: 6, 23: 6, 24: 4, 25: 2, 26: 6, 27: 6}, " dogs"),
    ({21: 6, 27: 2}, " Answer"),  # a word of the answer if need be
    ({21: 6}, ","),  # or what is no word
])  # fmt: skip
def test_it_opens_on_a_word_of_the_prompt_that_many_layers_find_redundant(
    browser, tmp_path, n_redundant, chosen
):
    redundant = torch.zeros(6, len(OPENING), dtype=torch.bool)
    for t, n in n_redundant.items():
        redundant[6 - n :, t] = True
    browser.get(write_random(tmp_path / "page.html", OPENING, 27, redundant=redundant))
    layer, token = browser.execute_script("return [layer, token]")
    assert OPENING[token] == chosen
    assert redundant[layer, token]


COLOURS = """
    function coloursOf(selector, property) {
      const nodes = [...document.querySelectorAll(selector)];
      return [...new Set(nodes.map(node => getComputedStyle(node)[property]))];
    }
    return [
      coloursOf(".bar .key", "backgroundColor"), coloursOf(arguments[0], "backgroundColor"),
      coloursOf("circle.kept", "fill"), coloursOf("circle.redundant", "fill"),
      coloursOf("circle.warm", "fill"),
    ];"""


@pytest.mark.parametrize("name, other", [("local", ".bar .value"), ("cache", ".bar .query")])
def test_a_colour_has_one_meaning(browser, tmp_path, name, other):
    pieces = [f" {i}" for i in range(60)]
    browser.get(write_random(tmp_path / "page.html", pieces, 40, name=name))
    choose(browser, 3, 50)
    colours = browser.execute_script(COLOURS, other)
    assert [len(each) for each in colours] == [1] * 5
    assert len({each[0] for each in colours}) == 5


def test_every_dot_and_number_says_what_it_is(browser, tmp_path):
    browser.get(write_random(tmp_path / "page.html", [f" {i}" for i in range(60)], 40))
    choose(browser, 3, 50)
    dots = browser.find_elements("css selector", "#ranks circle:not(.ring)")
    assert len(dots) == 50
    digits = decided(browser)[3]
    for t, dot in enumerate(dots):
        kind = "redundant" if digits[t] == "1" else "kept"
        title = dot.find_element("css selector", "title").get_attribute("textContent")
        assert title.startswith(f'token {t}, " {t}": ')
        assert title.endswith("warm-up" if t < 16 else kind)
        assert dot.get_attribute("class") == ("warm" if t < 16 else kind)

    assert text_of(browser, "first") == ""
    choose(browser, 3, 0)
    assert "compared with itself" in text_of(browser, "first")
    numbers = [span.text for span in browser.find_elements("css selector", "#layers span")]
    assert numbers == [*"012345", "layer"]
    numbers_and_names = "const w = []; pen.fillText = text => w.push(text); paint(); return w"
    written = browser.execute_script(numbers_and_names)
    assert len(written) > 8
    assert written == [*range(0, 5 * (len(written) - 2), 5), "warm-up ends", "answer"]


def test_one_of_a_thing_is_written_so(browser, tmp_path):
    browser.get(write_random(tmp_path / "page.html", [f" {i}" for i in range(90)], 70))
    script = """
        choose(2, arguments[0]);
        return ["verdict", "sees", "what-if"].map(id => $(id).textContent);"""
    said = [" ".join(browser.execute_script(script, t)) for t in range(90)]
    assert "It sees 1 sink and 0 recent tokens" in said[0]
    assert "It sees 16 sinks and 1 recent token (" in said[16]
    assert "16 sinks and 33 recent tokens" in said[80]
    assert any("1 far one." in text for text in said)
    for text in said:
        assert not re.search(r"\b1 (sinks|recent tokens|far ones)|of the 1 scores", text)
        assert not re.search(r"\b1 of the \d+ scores? before it are", text)


WRITTEN = """
    const written = [], fill = pen.fillText;
    pen.fillText = (text, x) => written.push([text, x, x + pen.measureText(text).width]);
    paint();
    pen.fillText = fill;
    return [written, box.scrollLeft, box.clientWidth, cell.w];"""


@pytest.mark.parametrize("T", [20, 46, 86, 300, 1000, 14_000])
def test_numbers_and_names_on_the_map_are_whole_wherever_it_is_scrolled(browser, tmp_path, T):
    pieces = [f"word{t} " for t in range(T)]
    browser.get(write_random(tmp_path / "page.html", pieces, T - 2, L=3))
    middle = T // 2 * 5 + 3
    end = T * 16 + 90
    for place in (0, 7, 43, middle, end):
        browser.execute_script("box.scrollLeft = arguments[0]", place)
        written, left, width, cell = browser.execute_script(WRITTEN)
        right = left + width
        for text, start, stop in written:
            assert left <= start and stop <= right, (text, start, stop, left, right)
        numbers = {text: (start, stop) for text, start, stop in written if isinstance(text, int)}
        for t, (start, stop) in numbers.items():  # a number touches its own cell
            assert start == t * cell or stop == pytest.approx((t + 1) * cell), t
        step = min(b - a for a, b in zip(numbers, [*numbers][1:]))
        in_sight = [t for t in range(0, T, step) if left <= t * cell and (t + 1) * cell <= right]
        assert [*numbers] == in_sight
    assert "answer" in [text for text, _, _ in written]


# Of twenty places on the map, in the middle of its height, those that have a colour.
COLOURED = """
    let coloured = 0;
    for (let i = 0; i < 20; i++) {
      const x = canvas.width * (i + 0.5) / 20;
      const [r, g, b, alpha] = pen.getImageData(x, canvas.height / 2, 1, 1).data;
      if (alpha === 255 && Math.max(r, g, b) - Math.min(r, g, b) > 12) {
        coloured += 1;
      }
    }
    return [canvas.width, coloured];"""

INSIDE = """
    const outer = document.querySelector(arguments[0]).getBoundingClientRect();
    const inner = document.querySelector(arguments[1]).getBoundingClientRect();
    return outer.left <= inner.left + 1 && outer.top <= inner.top + 1
      && outer.right >= inner.right - 1 && outer.bottom >= inner.bottom - 1;"""


@pytest.mark.parametrize("T", [300, 14_000])
def test_a_long_text_is_drawn_where_it_is_in_sight(browser, tmp_path, T):
    pieces = [f"word{t} " for t in range(T)]
    browser.get(write_random(tmp_path / "page.html", pieces, T, L=3))
    for t in (0, T // 2, T - 1):
        choose(browser, 1, t)
        assert browser.execute_script(INSIDE, "#text", "#text .chosen")
        assert browser.execute_script(INSIDE, "#scroll", "#cell")
        browser.execute_script("paint()")
        width, coloured = browser.execute_script(COLOURED)
        assert width < 5000
        assert coloured >= 17  # at the end a little room is left for words


def test_pointing_repaints_no_cell(browser, tmp_path):
    browser.get(write_random(tmp_path / "page.html", ["word "] * 400, 300))
    script = """
        let n = 0;
        const fill = pen.fillRect;
        pen.fillRect = () => n++;
        choose(2, 30);
        choose(3, 31);
        pen.fillRect = fill;
        return n;"""
    assert browser.execute_script(script) == 0


def test_a_click_holds_and_lets_go(browser, tmp_path):
    """With real clicks and keys: those that scripts make do not move the focus."""
    from selenium.webdriver import ActionChains, Keys

    browser.get(write_random(tmp_path / "page.html", [f" word{t}" for t in range(60)], 40))
    spans = spans_of(browser)
    title = browser.find_element("id", "title")
    slider = browser.find_element("id", "ratio")
    canvas = browser.find_element("id", "map")

    def token():
        return int(text_of(browser, "where").split(",")[0].removeprefix("Token "))

    def point(element):
        ActionChains(browser).move_to_element(element).perform()

    def click(element):
        ActionChains(browser).move_to_element(element).click().perform()

    def press(key):
        ActionChains(browser).send_keys(key).perform()

    # Pointing alone.
    point(spans[30])
    assert token() == 30
    point(spans[31])
    assert token() == 31

    # A click holds, and keys work after a click in the text. They hold as well.
    click(spans[20])
    point(spans[33])
    assert token() == 20
    press(Keys.ARROW_RIGHT)
    press(Keys.ARROW_RIGHT)
    point(spans[33])
    assert token() == 22

    # A click elsewhere lets go, but not one on the slider.
    click(title)
    point(spans[33])
    assert token() == 33
    click(spans[25])
    click(slider)
    point(spans[33])
    assert token() == 25

    press(Keys.ESCAPE)
    point(spans[34])
    assert token() == 34

    # The same on the map.
    click(canvas)
    point(spans[10])
    held = token()
    assert held != 10
    press(Keys.ARROW_LEFT)
    point(spans[10])
    assert token() == held - 1

    # A click on what is held lets go.
    click(spans[held - 1])
    point(spans[12])
    assert token() == 12
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
