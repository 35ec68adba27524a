from __future__ import annotations

import pytest

from raysched.tracking import StoreHandle, ui


class Ended:
    """A server's process that has nothing left to stop."""

    pid = 2**30

    def wait(self, timeout_s: float) -> int:
        return 0


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_the_pages_are_asked_for_at_a_url_that_is_one(
    monkeypatch: pytest.MonkeyPatch, host: str, shown: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ui, "prepare_store", lambda *_: StoreHandle("sqlite:///x", "", "e"))
    monkeypatch.setattr(ui, "_free_port", lambda *_: 5001)
    monkeypatch.setattr(ui, "_start", lambda *_: Ended())
    monkeypatch.setattr(ui, "_wait_until_it_answers", lambda _, url, __: asked.append(url))
    page = ui.Page("sqlite:///x")
    url = ui.serve(page, host=host, port=0, ready=asked.append, asked_to_stop=lambda: True)
    assert asked == [f"http://{shown}:5001"] * 2
    assert url == f"http://{shown}:5001"
