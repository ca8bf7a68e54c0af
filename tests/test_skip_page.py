"""The page holds the run's decisions, scores and ranks; no text in it is markup; in a browser it re-decides as the run did."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

import generate
from load_weights import load
from filter_config import layer_ratios
from cli.skip_map import Decisions, write_skip_page
from test_model import small, texts
from filter_config import PRESETS, preset
from token_filter import exceeds_quantile

HOSTILE = ["</script><script>alert(1)</script>", "<!--", '"', "'\\", "\n", "\u2028", "🦊", "&lt;", "<img src=x onerror=alert(1)>", "]]>"]


class Scripts(HTMLParser):
    """The contents of script elements, and all tags."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.tags, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def write(path, name="paper", prune=0.5, T=90, pieces=None, **more):
    """A page of T tokens through the small model of 4 layers, fed in two chunks and one by one; what was decided, and its data."""
    model, filter = small(), preset(name, prune=prune, **more)
    watched, cache = Decisions(1, 4), model.new_cache(1, filter)
    for part in texts()[:1, :T].split([40, 20, *[1] * (T - 60)], 1):
        model(part, cache)
        watched.watch([0], cache)
    pieces = pieces or [f" {i}" for i in range(T + 1)]
    write_skip_page(path, f"{name}, prune {prune}", pieces, 70, watched, filter)
    return watched, filter, json.loads(Scripts(path.read_text(encoding="utf-8")).scripts[0])


@pytest.mark.parametrize("name", PRESETS)
def test_the_data_are_the_run_s(tmp_path, name):
    watched, filter, data = write(tmp_path / "page.html", name)
    assert data["ratios"] == layer_ratios(filter, 4) and (data["mode"], data["recent"], data["warmup"]) == (filter.mode, filter.recent, 16)
    assert data["redundant"] == ["".join(str(int(flag)) for flag in row) for row in watched.redundant[0]] and "1" in data["redundant"][2]
    for l, ratio in enumerate(data["ratios"]):
        scored = 0 < ratio and not (ratio == 1 and filter.mode == "skip")
        assert (data["score"][l] is not None) == scored == (data["cosine_k"][l] is not None) == (data["weight"][l] is not None)
        if not scored:
            continue
        assert data["score"][l] == watched.score[0][l].tolist()  # to the last bit
        k, v, w, s = (torch.tensor(data[key][l]).double() for key in ("cosine_k", "cosine_v", "weight", "score"))
        torch.testing.assert_close(w * k.mean(1) + (1 - w) * v.mean(1), s, rtol=0, atol=2e-4)
        past = [s[None, None, max(0, t - data["history"]) : t] for t in range(90)]
        again = [bool(exceeds_quantile(s[t : t + 1, None], p, torch.tensor([[p.numel()]]), ratio)) and t >= 16 for t, p in enumerate(past)]
        assert "".join("01"[flag] for flag in again) == data["redundant"][l]


def test_nothing_of_a_text_becomes_markup(tmp_path):
    plain, page = tmp_path / "plain.html", tmp_path / "page.html"
    write(plain)
    _, _, data = write(page, pieces=(HOSTILE * 10)[:91])
    assert data["pieces"] == (HOSTILE * 10)[:91]
    text = page.read_text(encoding="utf-8")
    assert Scripts(text).tags == Scripts(plain.read_text(encoding="utf-8")).tags
    own = text.replace(Scripts(text).scripts[0], "")
    assert "onerror" not in own and not re.search(r"(?:src|href)=|@import|url\(|fetch\(|innerHTML|document\.write", own)


def test_a_long_text_stays_small(tmp_path):
    watched = Decisions(1, 30)
    watched.redundant, watched.score = [torch.rand(30, 2000) < 0.5], [torch.rand(30, 2000).double()]
    watched.cosine, watched.w_k = [[[torch.rand(2000, 2, 3).double()]] * 30], [[[torch.rand(2000).double()]] * 30]
    write_skip_page(tmp_path / "page.html", "long", ["word"] * 2000, 1500, watched, preset("local", prune=0.5))
    assert (tmp_path / "page.html").stat().st_size < 10_000_000


def test_the_command_writes_it(checkpoint, tmp_path):
    path = tmp_path / "page.html"
    flags = ["--prune", "0.5", "--preset", "cache", "--max-new-tokens", "5", "--ignore-eos", "--skip-map", str(path)]
    generate.main([str(checkpoint), "--prompt", "the quick brown fox </script> " * 4, "--device", "cpu", *flags])
    data = json.loads(Scripts(path.read_text(encoding="utf-8")).scripts[0])
    _, tokenizer = load(checkpoint, "cpu")
    prompt = tokenizer.encode("the quick brown fox </script> " * 4)
    assert data["prompt"] == len(prompt) and len(data["pieces"]) == len(prompt) + 5 == len(data["redundant"][0]) + 1
    assert "</script>" in "".join(data["pieces"]) and data["title"] == "cache, prune 0.5"


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


DECIDED = "return decided.map(row => row.map(Number).join(''))"


@pytest.mark.parametrize("name", PRESETS)
def test_in_a_browser(browser, tmp_path, name):
    _, _, data = write(tmp_path / "page.html", name, pieces=(HOSTILE * 10)[:91])
    browser.get(f"file://{tmp_path / 'page.html'}")
    shown = {each: browser.find_element("id", each) for each in ("verdict", "where", "sees", "ratio", "what-if", "scroll", "text", "reset")}
    assert browser.title == f"Skip map: {data['title']}" and browser.execute_script(DECIDED) == data["redundant"]
    assert len(shown["text"].find_elements("css selector", ":scope > span")) == 91
    assert not shown["text"].find_elements("css selector", "img, script")

    layer, token = browser.execute_script("return [layer, token]")
    assert data["redundant"][layer][token] == "1" and shown["where"].text.startswith(f"Token {token}, ")
    spans = shown["text"].find_elements("css selector", "span")
    point = "arguments[0].dispatchEvent(new MouseEvent('mouseenter'))"
    browser.execute_script(point, spans[20])
    assert shown["where"].text.startswith("Token 20, ")
    before = shown["where"].text, shown["verdict"].text
    browser.execute_script("arguments[0].click()", spans[60])
    browser.execute_script(point, spans[20])  # a click holds the choice
    assert shown["where"].text.startswith("Token 60, ") and (shown["where"].text, shown["verdict"].text) != before
    for box, token in (("scroll", 59), ("text", 58)):
        shown[box].send_keys("\ue012")  # the left arrow
        assert shown["where"].text.startswith(f"Token {token}, ")

    for l, ratio in enumerate(data["ratios"]):
        browser.execute_script("choose(arguments[0], 50)", l)
        if data["score"][l] is None:
            assert not shown["ratio"].is_enabled() and "ratio is" in shown["verdict"].text
            continue
        n, s = 50, data["score"][l]
        below = sum(x < s[50] for x in s[:50])
        needed = n - int(n * ratio + 1e-9)
        assert f"{below} of the 50 scores before it {'is' if below == 1 else 'are'} lower, {needed} would do" in shown["verdict"].text
        assert ("kept" in shown["verdict"].text) == (data["redundant"][l][50] == "0") and shown["sees"].text
        slide = "const r = document.getElementById('ratio'); r.value = arguments[0]; r.dispatchEvent(new Event('input'))"
        browser.execute_script(slide, 0)
        assert "1" not in browser.execute_script(DECIDED)[l] and shown["what-if"].text.startswith("0 of this layer")
        browser.execute_script(slide, 1)
        assert browser.execute_script(DECIDED)[l] == "0" * 16 + "1" * 74
        browser.execute_script(slide, ratio)
        assert browser.execute_script(DECIDED)[l] == data["redundant"][l]
        browser.execute_script(slide, 0.9)
        browser.execute_script("arguments[0].click()", shown["reset"])
        assert browser.execute_script(DECIDED) == data["redundant"]
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def made(path, pieces, n_prompt, L=6, redundant=None):
    """A page of any text under `cache`, with drawn decisions and scores; redundant (L, T)."""
    T, filter, watched = len(pieces), preset("cache", prune=0.5), Decisions(1, L)
    watched.redundant = [torch.rand(L, T) < 0.5 if redundant is None else redundant]
    watched.score = [torch.rand(L, T).double()]
    watched.cosine = [[[torch.rand(T, 2, 2).double()] for _ in range(L)]]
    watched.w_k = [[[torch.rand(T).double()] for _ in range(L)]]
    write_skip_page(path, "title", pieces, n_prompt, watched, filter)
    return f"file://{path}"


def test_it_opens_on_a_word_of_the_prompt_that_many_layers_find_redundant(browser, tmp_path):
    pieces = [*(["x"] * 16), "<|im_start|>", "user", "\n", "The", " quick", ",", " sleep", "ing", " dogs", " are", ".", " Answer", " here"]
    for redundant_in, chosen in (
        ({17: 6, 20: 3, 21: 6, 22: 6, 23: 6, 24: 4, 25: 2, 26: 6, 27: 6}, 24),  # not a role, a sign, a part of a word or an answer's word
        ({21: 6, 27: 2}, 27),  # if need be, an answer's word
        ({21: 6}, 21),  # or what is no word
    ):
        redundant = torch.zeros(6, len(pieces), dtype=torch.bool)
        for t, layers in redundant_in.items():
            redundant[6 - layers :, t] = True
        browser.get(made(tmp_path / "page.html", pieces, 27, redundant=redundant))
        layer, token = browser.execute_script("return [layer, token]")
        assert token == chosen and redundant[layer, token], pieces[token]


def test_one_meaning_a_colour_and_every_number_says_what_it_is(browser, tmp_path):
    browser.get(made(tmp_path / "page.html", [f" {i}" for i in range(60)], 40))
    colours = """
        const of = (where, what) => [...new Set([...document.querySelectorAll(where)].map(x => getComputedStyle(x)[what]))];
        const bars = [".bar .key", ".bar .value"], dots = ["circle.kept", "circle.redundant", "circle.warm"];
        return [...bars.map(x => of(x, "backgroundColor")), ...dots.map(x => of(x, "fill"))]"""
    browser.execute_script("choose(3, 50)")
    found = browser.execute_script(colours)
    assert [len(each) for each in found] == [1] * 5 and len({each[0] for each in found}) == 5
    dots = browser.find_elements("css selector", "#ranks circle:not(.ring)")
    decided = browser.execute_script("return decided[3]")
    assert len(dots) == 50
    for t, dot in enumerate(dots):
        word = "warm" if t < 16 else "redundant" if decided[t] else "kept"
        assert dot.get_attribute("class") == word
        title = dot.find_element("css selector", "title").get_attribute("textContent")
        assert title.startswith(f'token {t}, " {t}": ') and title.endswith("warm-up" if t < 16 else word)
    said = browser.find_element("id", "first")
    assert said.text == ""
    browser.execute_script("choose(3, 0)")
    assert "compared with itself" in said.text
    numbers = [span.text for span in browser.find_elements("css selector", "#layers span")]
    assert numbers == [*"012345", "layer"]
    written = browser.execute_script("const w = []; pen.fillText = text => w.push(text); paint(); return w")
    assert len(written) > 8 and written == [*range(0, 5 * (len(written) - 2), 5), "warm-up ends", "answer"]


def test_it_says_what_marks_an_answer(tmp_path):
    write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.search(r"#text span\.answer \{[^}]*font-weight: 700[^}]*underline dotted", page)
    assert "The answer is bold, with a dotted line under it." in page


def test_one_of_a_thing_is_written_so(browser, tmp_path):
    browser.get(made(tmp_path / "page.html", [f" {i}" for i in range(90)], 70))
    said = "choose(2, arguments[0]); return ['verdict', 'sees', 'what-if'].map(id => $(id).textContent)"
    texts = [" ".join(browser.execute_script(said, t)) for t in range(90)]
    assert "It sees 1 sink and 0 recent tokens" in texts[0]
    assert "It sees 16 sinks and 1 recent token (" in texts[16]
    assert "16 sinks and 33 recent tokens" in texts[80]
    assert any("1 far one." in text for text in texts)
    assert not any(re.search(r"\b1 (sinks|recent tokens|far ones)|of the 1 scores", t) for t in texts)
    assert not any(re.search(r": 1 of the \d+ scores before it are|\(1 of the \d+ scores? before it are", t) for t in texts)


WRITTEN = """
    const written = [], fill = pen.fillText;
    pen.fillText = (text, x) => written.push([text, x, x + pen.measureText(text).width]);
    paint();
    pen.fillText = fill;
    return [written, box.scrollLeft, box.clientWidth, cell.w]"""


@pytest.mark.parametrize("T", [20, 46, 86, 300, 1000, 14_000])
def test_numbers_and_names_on_the_map_are_whole_wherever_it_is_scrolled(browser, tmp_path, T):
    browser.get(made(tmp_path / "page.html", [f"word{t} " for t in range(T)], T - 2, L=3))
    middle, end = T // 2 * 5 + 3, T * 16 + 90
    for place in (0, 7, 43, middle, end):
        browser.execute_script("box.scrollLeft = arguments[0]", place)
        written, left, wide, cell = browser.execute_script(WRITTEN)
        for text, start, stop in written:
            assert left <= start and stop <= left + wide, (text, start, stop, left, wide)
        numbers = {text: (start, stop) for text, start, stop in written if isinstance(text, int)}
        for t, (start, stop) in numbers.items():  # a number touches its own cell
            assert start == t * cell or stop == pytest.approx((t + 1) * cell), t
        step = min(b - a for a, b in zip(numbers, [*numbers][1:]))
        whole = [t for t in range(0, T, step) if left <= t * cell and (t + 1) * cell <= left + wide]
        assert [*numbers] == whole  # of every cell that is whole in sight
    assert "answer" in [text for text, *_ in written]


PAINTED = """
    const at = [...Array(20).keys()].map(i => pen.getImageData(canvas.width * (i + 0.5) / 20, canvas.height / 2, 1, 1).data);
    return [canvas.width, at.filter(p => p[3] === 255 && Math.max(p[0], p[1], p[2]) - Math.min(p[0], p[1], p[2]) > 12).length]"""


@pytest.mark.parametrize("T", [300, 14_000])
def test_a_long_text_is_drawn_where_it_is_in_sight(browser, tmp_path, T):
    browser.get(made(tmp_path / "page.html", [f"word{t} " for t in range(T)], T, L=3))
    for t in (0, T // 2, T - 1):
        browser.execute_script("choose(1, arguments[0])", t)
        inside = """
            const [outer, inner] = [arguments[0], arguments[1]].map(x => document.querySelector(x).getBoundingClientRect());
            const within = (side, sign) => sign * outer[side] <= sign * inner[side] + 1;
            return within("left", 1) && within("top", 1) && within("right", -1) && within("bottom", -1)"""
        assert browser.execute_script(inside, "#text", "#text .chosen") and browser.execute_script(inside, "#scroll", "#cell")
        browser.execute_script("paint()")
        width, coloured = browser.execute_script(PAINTED)
        assert width < 5000 and coloured >= 17  # at the end a little room is left for words


def test_pointing_repaints_no_cell(browser, tmp_path):
    browser.get(made(tmp_path / "page.html", ["word "] * 400, 300))
    count = "let n = 0; const fill = pen.fillRect; pen.fillRect = () => n++; choose(2, 30); choose(3, 31); pen.fillRect = fill; return n"
    assert browser.execute_script(count) == 0


def test_a_click_holds_and_lets_go(browser, tmp_path):
    """With real clicks and keys: those that scripts make do not move the focus."""
    from selenium.webdriver import ActionChains, Keys

    browser.get(made(tmp_path / "page.html", [f" word{t}" for t in range(60)], 40))
    where, spans = browser.find_element("id", "where"), browser.find_elements("css selector", "#text span")
    on, canvas = lambda: int(where.text.split(",")[0].removeprefix("Token ")), browser.find_element("id", "map")

    def do(*steps):
        for step in steps:
            if isinstance(step, str):
                ActionChains(browser).send_keys(step).perform()
            else:
                ActionChains(browser).move_to_element(step).perform()
                if step in clicked:
                    ActionChains(browser).click().perform()
        return on()

    clicked = []
    assert do(spans[30]) == 30 and do(spans[31]) == 31  # pointing alone
    clicked = [spans[20]]
    assert do(spans[20], spans[33]) == 20  # held
    assert do(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, spans[33]) == 22  # keys work after a click in the text, and hold as well
    clicked = [browser.find_element("id", "title")]
    assert do(clicked[0], spans[33]) == 33  # a click elsewhere lets go
    clicked = [spans[25], browser.find_element("id", "ratio")]
    assert do(spans[25], clicked[1], spans[33]) == 25  # but not one on the slider
    assert do(Keys.ESCAPE, spans[34]) == 34
    clicked = [canvas]
    held = do(canvas, spans[10])
    assert held != 10 and do(Keys.ARROW_LEFT, spans[10]) == held - 1  # on the map the same
    clicked = [spans[held - 1]]
    assert do(clicked[0], spans[12]) == 12  # a click on what is held lets go
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
