"""Signals that arrive while something is put into its place."""

import signal
import threading

import pytest

from vsc_serve.console import holding_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_effect_at_the_end_of_the_block(number: signal.Signals) -> None:
    seen: list[str] = []
    earlier = signal.signal(number, lambda *_: seen.append("handled"))
    try:
        with holding_signals():
            signal.raise_signal(number)
            signal.raise_signal(number)
            seen.append("done")
        assert seen == ["done", "handled"]
        signal.raise_signal(number)
        assert seen[2:] == ["handled"]
    finally:
        signal.signal(number, earlier)


def test_an_error_in_the_block_gives_the_handlers_back() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="full"), holding_signals():
        raise OSError("full")
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_other_threads_go_on_without_holding() -> None:
    done: list[bool] = []

    def work() -> None:
        with holding_signals():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
