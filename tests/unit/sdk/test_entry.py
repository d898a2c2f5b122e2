"""The entry point: one way in, one answer, one message, one exit code."""

from __future__ import annotations

import contextlib
import errno
import signal

import pytest

from oned_backup import errors

ANSWER = "TOTAL_MB=3\nUSED_MB=1\nFREE_MB=2\n"
RETURN = "return {'TOTAL_MB': 3, 'USED_MB': 1, 'FREE_MB': 2}"


def test_the_answer_and_nothing_else_is_on_stdout(driver):
    done = driver(
        f"""
        import subprocess
        print("stray")
        os.write(1, b"raw\\n")
        subprocess.run(["echo", "child"])
        os.system("echo shell")
        call.log("a line")
        {RETURN}
        """
    ).run()
    assert (done.code, done.stdout) == (0, ANSWER)
    assert {"stray", "raw", "child", "shell", "<6>a line"} <= set(done.stderr.splitlines())


def test_a_request_that_is_never_read_does_no_harm(driver):
    process = driver(RETURN).start()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"x" * 10_000_000)
    assert process.wait(60) == 0
    assert process.stdout.read().decode() == ANSWER


def test_none_is_an_empty_answer(driver):
    done = driver("return None").run()
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "DriverFailed",
            "InvalidInput",
            "Conflict",
            "Unsupported",
            "DataCorrupt",
            "NotFound",
            "Unavailable",
        ),
        *("NoSpace", "Busy", "PermissionDenied", "Misconfigured", "Salvaged"),
    ],
)
def test_an_error_is_its_exit_code_and_one_line(driver, name):
    done = driver(f"raise errors.{name}('disk 7:\\n 12 GB needed', hint='Buy one.')").run()
    assert done.code == getattr(errors, name).exit_code
    assert (done.stdout, done.stderr) == ("", "disk 7: 12 GB needed. Buy one.\n")


def test_a_bug_shows_where_it_happened_and_ends_with_the_message(driver):
    done = driver("return {}['x']").run()
    assert done.code == 70
    assert "<3>Traceback (most recent call last):" in done.stderr
    assert done.message == "KeyError: 'x'"


@pytest.mark.parametrize("body", ["return {'TOTAL_MB': 'two\\nlines'}", "return {'lower': 1}", "sys.exit(0)"])
def test_an_answer_that_breaks_the_contract_is_a_bug(driver, body):
    done = driver(body).run()
    assert (done.code, done.stdout) == (70, "")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((number, 73) for number in (errno.ENOSPC, errno.EDQUOT)),
        *((number, 69) for number in (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT)),
        *((number, 77) for number in (errno.EACCES, errno.EPERM, errno.EROFS)),
        *((number, 1) for number in (errno.EMFILE, errno.EPIPE)),
        (errno.ENOENT, 70),
    ],
)
def test_what_the_system_says_becomes_what_the_daemon_should_do(driver, number, code):
    done = driver(f"raise OSError({number}, 'x', '/srv/b/file')").run()
    assert done.code == code
    assert done.message.startswith(("/srv/b/file: ", "FileNotFoundError: /srv/b/file: ", "whoever"))


def test_a_full_store_tells_what_was_needed_and_what_is_free(driver, tmp_path):
    body = f"import pathlib; call.require_space(pathlib.Path({str(tmp_path)!r}), "
    done = driver(f"{body} 1 << 60)").run()
    assert done.code == 73
    assert done.message.startswith(f"{tmp_path}: 1099511627776 MB needed, ")
    done = driver(f"{body} 5 << 20); raise OSError(28, 'x')").run()
    assert "5 MB needed, " in done.message


def test_an_action_that_there_is_not_is_unsupported(driver):
    script = driver(RETURN)
    other = script.path.with_name("verify")
    script.path.rename(other)
    script.path = other
    assert script.run().code == 64
    assert driver("return {}", action="frobnicate").run().code == 64


def test_another_version_of_the_contract_is_unsupported(driver):
    done = driver(RETURN).run(env={"ODB_SPEC": "2"})
    assert (done.code, done.stdout) == (64, "")
    assert "version 2" in done.message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_finally_clean_up(driver, number):
    done = driver(
        """
        try:
            call.log("working")
            time.sleep(60)
        finally:
            os.kill(os.getpid(), 15)  # a second one does not disturb
            call.log("cleaned up")
        """
    ).stop_when_it_says(b"<6>working", number)
    assert done.code == 128 + number
    assert "<6>cleaned up" in done.stderr
    assert done.message == f"ended by {number.name}"
    assert "Traceback" not in done.stderr


def test_a_signal_that_the_driver_swallows_is_still_no_success(driver):
    done = driver(
        f"""
        try:
            call.log("working")
            time.sleep(60)
        except Exception:
            pass
        {RETURN}
        """
    ).stop_when_it_says(b"<6>working")
    assert (done.code, done.stdout) == (143, "")


def test_a_signal_that_came_while_the_driver_warmed_up_ends_it_before_it_begins(driver):
    script = driver("raise AssertionError('it began')")
    warm_up = "D.warm_up = lambda *_: os.kill(os.getpid(), 15)\nsdk.main"
    script.path.write_text(script.path.read_text().replace("sdk.main", warm_up))
    done = script.run(b"13\nODB_SPEC=1\0A=b", env={"ODB_AHEAD": "1"})
    assert (done.code, done.message) == (143, "ended by SIGTERM")


def test_a_thread_that_hangs_does_not_hold_the_process(driver):
    done = driver(
        f"import threading; threading.Thread(target=time.sleep, args=(3600,)).start()\n{RETURN}"
    ).run()
    assert (done.code, done.stdout) == (0, ANSWER)


def test_a_daemon_that_is_gone_does_not_stop_the_work(driver, tmp_path):
    process = driver(
        f"""
        sys.stdin.buffer.read()
        for _ in range(1000):
            call.log("does anybody hear me")
            call.progress(1, 2)
        open({str(tmp_path / "done")!r}, "w").close()
        """
    ).start()
    process.stderr.close()
    process.stdin.close()
    process.wait(60)
    assert (tmp_path / "done").exists()


def test_nothing_slow_is_imported_before_the_first_effect(driver):
    done = driver("return {'TOTAL_MB': ','.join(sorted(sys.modules))}").run()
    loaded = set(done.stdout.removeprefix("TOTAL_MB=").strip().split(","))
    slow = {"paramiko", "xmltodict", "asyncio", "nbd", "libvirt", "oned_backup.disk", "sqlalchemy", "typer"}
    assert "oned_backup.sdk" in loaded
    assert not slow & loaded
