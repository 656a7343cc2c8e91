"""What the page asks of a model, and the server between them. The page itself, in a browser: `make web-test`."""

import http.client
import io
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import igpt
from igpt import ImageGPT, Palette, data, sample
from igpt.data.crops import eval_crop
from igpt.programs import web
from igpt.web import Server, Studio, probe_of, server, studio

SIDE, COLOURS = 8, 64


def tiny(**overrides) -> ImageGPT:
    config = {"n_layer": 2, "width": 32, "heads": 2, "n_ctx": SIDE * SIDE, "vocab": COLOURS, **overrides}
    torch.manual_seed(0)
    model = ImageGPT.from_preset("tiny", **config)
    torch.nn.init.normal_(model.head, 0, 0.3)
    model.palette = Palette(torch.cartesian_prod(*3 * [torch.linspace(-1, 1, 4)]))
    return model.eval()


@pytest.fixture(scope="module")
def room() -> Studio:
    model = tiny()
    return Studio(model, model.palette, SIDE, "tiny")


def wish(**changes) -> dict:
    tokens = (np.arange(SIDE * SIDE) % COLOURS).tolist()
    asked = {"tokens": tokens, "rows": 3, "completions": 2, "temperature": 0.9, "top_k": 20, "seed": 5}
    return {**asked, **changes}


def png(image: np.ndarray, kind: str = "PNG", **how) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), kind, **how)
    return file.getvalue()


@pytest.mark.parametrize("rows", [0, 3, SIDE - 1])
def test_rows_are_those_of_the_completion(room, rows):
    drawn = torch.tensor(list(room.complete(wish(rows=rows))))
    assert drawn.shape == (SIDE - rows, 2, SIDE)
    how = {"temperature": 0.9, "top_k": 20, "seed": 5}
    if rows:
        tokens = torch.tensor(wish()["tokens"]).expand(2, -1)
        want = sample.complete(room.model, tokens, rows * SIDE, **how)
    else:
        want = sample.generate(room.model, 2, **how)
    assert torch.equal(drawn.transpose(0, 1).flatten(1), want[:, rows * SIDE :])


@pytest.mark.parametrize("changes, named", [
    ({"tokens": [0] * 63}, "tokens: expected a list of 64"), ({"tokens": "0" * 64}, "tokens"),
    ({"tokens": [True] * 64}, "tokens"), ({"tokens": [0.0] * 64}, "tokens"), ({"tokens": [64] * 64}, r"\[64, 64\]"),
    ({"tokens": [-1] * 64}, "tokens: got values"), ({"rows": SIDE}, "rows: got 8, expected an integer from 0 to 7"),
    ({"rows": None}, "rows: got None"), ({"completions": 17}, "completions: got 17, expected an integer from 1 to 16"),
    ({"completions": True}, "completions: got True"), ({"temperature": float("nan")}, "temperature: got nan"),
    ({"temperature": 4.1}, "temperature"), ({"temperature": -1}, "temperature"), ({"top_k": 0}, "top_k: got 0"),
    ({"top_k": 65}, "top_k: got 65"), ({"seed": 2**60}, "seed"), ({"seed": "a" * 999}, "seed: got 'a{39}, expected"),
])  # fmt: skip
def test_bad_wishes_are_refused_at_the_call(room, changes, named):
    with pytest.raises(ValueError, match=named):
        room.complete(wish(**changes))


def test_a_file_becomes_tokens(room):
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    square = eval_crop(Image.fromarray(image), SIDE)
    assert room.tokens_of(png(image)) == room.palette.encode(square[None])[0].tolist()
    assert room.tokens_of(png(square)) == room.palette.encode(square[None])[0].tolist(), "of our size: as it is"
    turned = Image.Exif()
    turned[0x0112] = 6
    image[:15] = 0
    upright = room.tokens_of(png(np.rot90(image, -1)))
    assert room.tokens_of(png(image, exif=turned)) == upright != room.tokens_of(png(image))


@pytest.mark.parametrize("file, said", [
    (b"", "none of BMP, GIF, JPEG, PNG, TIFF, WEBP, or is damaged"), (b"<svg/>", "none of BMP"),
    (png(np.zeros((9, 9, 3), np.uint8), "EPS"), "none of BMP"),
    (b"\0" * (studio.FILE_BYTES + 1), "got 16,777,217 bytes"),
    (png(np.zeros((99, 99, 3), np.uint8), "BMP")[:600], "cannot be read"),
])  # fmt: skip
def test_bad_files_are_refused_in_words(room, file, said):
    with pytest.raises(ValueError, match=f"^picture: .*{said}") as refused:
        room.tokens_of(file)
    assert "0x" not in str(refused.value), "no object's address"


def test_a_picture_of_too_many_pixels_is_not_unpacked(room, monkeypatch):
    monkeypatch.setattr(studio, "FILE_PIXELS", 99)
    monkeypatch.setattr(studio, "to_rgb", None)
    with pytest.raises(ValueError, match="10 x 10, more than 99 pixels"):
        room.tokens_of(png(np.zeros((10, 10, 3), np.uint8)))


def test_facts_and_emoji(room):
    facts = json.loads(json.dumps(room.facts()))
    assert facts["side"] == SIDE and len(facts["colours"]) == COLOURS and facts["colours"][facts["blank"]] == [255] * 3
    held_out = data.load("builtin:emoji", "test", size=SIDE).images
    assert room.emoji(3) == room.palette.encode(held_out[3:4])[0].tolist() == room.emoji(3 + len(held_out))


REPORT = {
    "layers": {"0": {"valid": 0.25, "strength": 1.0}, "1": {"valid": 0.5, "strength": 0.1}}, "best_layer": 1,
    "joined": [1], "strength": 0.1, "valid_accuracy": 0.5, "test_accuracy": 0.4, "pictures": [8, 4, 5], "classes": 3,
}  # fmt: skip


@pytest.mark.parametrize("place", ["probe.json", "probe/probe.json"])
def test_the_probe_of_a_run(tmp_path, place):
    assert probe_of(str(tmp_path)) is None and probe_of("builtin:emoji") is None
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(json.dumps(REPORT))
    found = probe_of(str(tmp_path))
    assert found["layers"] == {0: 0.25, 1: 0.5} and found["best_layer"] == 1 and found["test_accuracy"] == 0.4
    for changes in ({"layers": {}}, {"layers": {"<b>": {"valid": 1}}}, {"pictures": 3}, {"valid_accuracy": 2}):
        (tmp_path / place).write_text(json.dumps({**REPORT, **changes}))
        with pytest.raises(ValueError, match="not a report of igpt probe"):
            probe_of(str(tmp_path))


# --- over HTTP


@pytest.fixture
def running(room):
    with Server(room, "127.0.0.1", 0) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.02,)).start()
        yield serving
        serving.shutdown()


def connect(serving) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=120)


def ask(serving, method: str, path: str, body=None, **headers):
    connection = connect(serving)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.read(), reply.headers


def test_the_page_is_served_and_nothing_else(running):
    for path, (name, kind) in server.PAGE.items():
        status, body, headers = ask(running, "GET", path)
        assert status == 200 and headers.get_content_type() == kind
        assert body == (Path(igpt.__file__).parent / "web" / "page" / name).read_bytes()
        assert "default-src 'none'" in headers["Content-Security-Policy"] and "Python" not in headers["Server"]
    for path in ("/../studio.py", "/page/page.js", "//etc/passwd", "/emoji/-1", "/emoji/1/..", "/%2e%2e/server.py"):
        status, body, _ = ask(running, "GET", path)
        assert status == 404 and json.loads(body) == {"error": "there is nothing here"}


def test_the_page_fetches_nothing_from_elsewhere():
    text = "".join(path.read_text() for path in (Path(igpt.__file__).parent / "web" / "page").iterdir())
    assert set(re.findall(r"https?://[^'\"\s]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_picture_then_completion(running, room):
    image = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    status, body, _ = ask(running, "POST", "/picture", png(image), Origin=running.url)
    tokens = json.loads(body)["tokens"]
    assert status == 200 and tokens == room.tokens_of(png(image))
    assert json.loads(ask(running, "GET", "/model")[1]) == json.loads(json.dumps(room.facts()))
    assert json.loads(ask(running, "GET", "/emoji/7")[1])["tokens"] == room.emoji(7)
    status, body, headers = ask(running, "POST", "/complete", json.dumps(wish(tokens=tokens)))
    assert status == 200 and headers.get_content_type() == "application/x-ndjson"
    assert [json.loads(line) for line in body.splitlines()] == list(room.complete(wish(tokens=tokens)))


@pytest.mark.parametrize("path, body, headers, status, said", [
    ("/picture", b"no picture", {}, 400, "picture: this file is none of"), ("/nowhere", b"", {}, 404, "nothing here"),
    ("/picture", None, {"Content-Length": f"{1 << 40}"}, 413, f"got {1 << 40} bytes, expected at most 16,777,216"),
    ("/complete", None, {"Content-Length": "-1"}, 411, "how long"),
    ("/complete", b"[1]", {}, 400, "request: got a JSON"),
    ("/complete", b'{"a": 1', {}, 400, "request: not valid JSON"), ("/complete", b"{}", {}, 400, "tokens: expected"),
    ("/complete", b"{}", {"Host": "evil.example:80"}, 403, "expected a request to http://127.0.0.1"),
    ("/complete", b"{}", {"Origin": "http://evil.example"}, 403, "our own page"),
])  # fmt: skip
def test_errors_are_words(running, path, body, headers, status, said):
    got, reply, _ = ask(running, "POST", path, body, **headers)
    assert got == status and said in json.loads(reply)["error"]


def test_the_queue_and_the_connections_are_bounded(running):
    for _ in range(1 + server.WAITING):
        running.waiting.acquire()
    status, body, _ = ask(running, "POST", "/complete", json.dumps(wish()))
    assert status == 503 and "4 others are waiting" in json.loads(body)["error"]
    running.waiting.release()
    for _ in range(2):  # a place that was given back is there for the next
        assert ask(running, "POST", "/complete", json.dumps(wish()))[0] == 200
    for _ in range(server.CONNECTIONS):  # waits for those that are just ending
        running.connections.acquire()
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        ask(running, "GET", "/")


def test_who_goes_away_stops_what_is_drawn(running, room, monkeypatch):
    stopped = threading.Event()

    def endless(asked):
        try:
            while True:
                yield [[0] * 5000]
        finally:
            stopped.set()

    monkeypatch.setattr(room, "complete", endless)
    connection = connect(running)
    connection.request("POST", "/complete", "{}")
    with connection.getresponse() as reply:
        assert json.loads(reply.readline()) == [[0] * 5000]
    connection.close()
    assert stopped.wait(120)


def test_what_breaks_while_drawing_is_the_last_line(running, room, monkeypatch, capfd):
    def breaks(asked):
        yield [[1]]
        raise RuntimeError("out of memory at /somewhere/secret")

    monkeypatch.setattr(room, "complete", breaks)
    first, last = map(json.loads, ask(running, "POST", "/complete", "{}")[1].splitlines())
    assert first == [[1]] and "the terminal says more" in last["error"] and "secret" in capfd.readouterr().err
    monkeypatch.setattr(room, "facts", lambda: 1 / 0)
    status, body, _ = ask(running, "GET", "/model")
    assert status == 500 and "the terminal says more" in json.loads(body)["error"]


# --- the program


def test_the_program_serves_until_ctrl_c(tmp_path, monkeypatch, capsys):
    def interrupted(self):
        assert self.studio.name == "mine" and str(tmp_path) not in json.dumps(self.studio.facts())
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    tiny().save_pretrained(tmp_path / "mine")
    report = web.run(web.Options(model=str(tmp_path / "mine"), port=0, device="cpu"))
    assert report["model"] == "mine" and f"{report['url']} (Ctrl-C ends it)" in capsys.readouterr().err
    assert web.Options().host == "127.0.0.1"


def test_the_program_refuses_in_words(tmp_path, room):
    tiny(objective="bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a BERT model, expected an autoregressive one"):
        web.run(web.Options(model=str(tmp_path / "bert"), device="cpu"))
    with Server(room, "127.0.0.1", 0) as there:
        for host, port in (("127.0.0.1", there.server_port), ("127.0.0.1", 99999), ("no.such.host.invalid", 0)):
            with pytest.raises(ValueError, match=f"host, port: got {host} and {port}, which cannot be had"):
                Server(room, host, port)
