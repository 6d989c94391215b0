"""Messages of a command at work: progress, --quiet, --log-file."""

import re
import time

import pytest

from linearize.cli import output, reporter
from linearize.progress import counting, doing, snapshot


@pytest.fixture(autouse=True)
def plain_messages():
    yield
    output.configure()


def test_a_count_belongs_to_what_is_done():
    with doing("reading"), counting(4) as advance:
        advance()
        now = snapshot()
        assert (now.name, now.done, now.total) == ("reading", 1, 4)
        assert now.seconds_left == pytest.approx(3 * now.seconds, rel=0.5)
        with doing("a part"):
            assert snapshot().name == "a part" and snapshot().seconds_left is None
        assert snapshot().done == 1
    assert snapshot().name == ""


def test_a_long_silence_in_a_log_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(reporter, "LOG_SILENCE", 0.05)
    monkeypatch.setattr(reporter, "TICK", 0.02)
    with reporter.reporting(), doing("scoring heads"), counting(30) as advance:
        advance()
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d scoring heads, 1 of 30, 0:00 so far, 0:0\d left, [\d.]+ GiB"
    assert all(re.fullmatch(pattern, line) for line in lines)


def test_a_terminal_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(reporter, "TERMINAL_SILENCE", 0.0)
    monkeypatch.setattr(reporter, "TICK", 0.02)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with reporter.reporting(), doing("scoring heads"), counting(30):
        time.sleep(0.3)
        output.note("a message [with brackets]")
        time.sleep(0.1)
    err = capsys.readouterr().err
    assert "scoring heads" in err and "0 of 30" in err and "a message [with brackets]" in err


def test_the_bar_leaves_before_a_result_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(reporter, "TERMINAL_SILENCE", 0.0)
    monkeypatch.setattr(reporter, "TICK", 0.02)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with reporter.reporting(), doing("scoring heads"), counting(30):
        time.sleep(0.3)
        assert output.bar() is not None
        monkeypatch.setattr(reporter, "TERMINAL_SILENCE", 60.0)
        output.emit("the result")
        assert output.bar() is None
        output.progress_line("step 1")
        assert output.shows_line()
        output.clear_progress()
    assert capsys.readouterr().out == "the result\n"


def test_quiet_prints_results_and_errors_alone(base_folder, cli, tmp_path):
    flags = ("--window", "12", "--keep-softmax", "none", "--no-verify")
    code, out, err = cli("convert", base_folder(), "-o", tmp_path / "out", *flags, "--quiet")
    # transformers, imported before this test, may still show a bar
    assert code == 0 and "calibrat" not in err and "become linear" not in err and str(tmp_path / "out") in out
    code, _, err = cli("convert", tmp_path / "nothing", "--quiet")
    assert code == 2 and err.startswith("error: ")


def test_a_log_file_gets_every_message_with_its_date(base_folder, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log = tmp_path / "log.txt"
    flags = ("--window", "12", "--keep-softmax", "none", "--no-verify", "--quiet", "--log-file", log)
    assert cli("convert", base_folder(), "-o", tmp_path / "out", *flags)[0] == 0
    assert cli("convert", tmp_path / "nothing", f"--log-file={log}")[0] == 2
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert any("calibrating layer" in line for line in lines) and "error: " in lines[-1]


def test_a_log_file_that_cannot_be_written_is_an_error(cli, tmp_path):
    code, _, err = cli("list", "mixers", "--log-file", tmp_path / "no" / "log.txt")
    assert code == 2 and "--log-file" in err
    assert cli("list", "mixers", "--log-file")[0] == 2
