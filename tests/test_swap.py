import os
import time

import pytest

from clip_train.settings import UserError
from retrieval import swap


def folder(path, what):
    path.mkdir()
    (path / "what").write_text(what)
    (path / "manifest.json").write_text("{}")
    return path


def test_two_folders_exchange_their_names_at_once(tmp_path):
    one, other = folder(tmp_path / "one", "a"), folder(tmp_path / "other", "b")
    if not swap.exchange(one, other):
        pytest.skip("this file system cannot exchange two names")
    assert (one / "what").read_text() == "b" and (other / "what").read_text() == "a"


def test_an_exchange_that_is_not_possible_changes_nothing(tmp_path):
    one = folder(tmp_path / "one", "a")
    assert not swap.exchange(one, tmp_path / "nothing")
    assert (one / "what").read_text() == "a" and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_and_nothing_is_left_beside_it(tmp_path, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(swap, "exchange", lambda *_: False)
    old = folder(tmp_path / "index", "old")
    folder(swap.successor_of(old), "new")
    swap.replace(old)
    assert (old / "what").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_folder_that_was_taken_away_in_the_middle_comes_back(tmp_path):
    old = folder(tmp_path / "index", "old")
    folder(swap.successor_of(old), "new")
    os.rename(old, swap.replaced_by(old))
    swap.wait_for(old)
    assert (old / "what").read_text() == "new"


def test_nobody_finishes_what_another_process_is_just_doing(tmp_path, monkeypatch):
    old = tmp_path / "index"
    new = folder(swap.successor_of(old), "new")
    folder(swap.replaced_by(old), "old")
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            os.rename(new, old)

    with swap.locked(new):
        monkeypatch.setattr(time, "sleep", sleep)
        swap.wait_for(old)
    assert len(waited) == 3 and (old / "what").read_text() == "new"


def test_a_folder_that_was_removed_does_not_come_back_as_what_was_to_replace_it(tmp_path):
    old = tmp_path / "index"
    folder(swap.successor_of(old), "whole, but never put in the place")
    swap.wait_for(old)
    assert not old.exists()


def test_a_folder_that_never_was_is_not_waited_for(tmp_path):
    began = time.monotonic()
    swap.wait_for(tmp_path / "index")
    assert time.monotonic() - began < 0.1


def test_a_lock_is_held_by_one_and_is_free_when_it_ends(tmp_path):
    one = folder(tmp_path / "one", "a")
    with swap.locked(one), pytest.raises(UserError, match="another process is changing .*one/; wait for it"):
        with swap.locked(one):
            pass
    with swap.locked(one):
        pass


def test_the_lock_is_that_of_the_folder_which_has_the_name_now(tmp_path, monkeypatch):
    """Between opening the lock and holding it, the folder may be replaced: then the new one's lock is taken."""
    one, other = folder(tmp_path / "one", "a"), folder(tmp_path / "other", "b")
    flock, taken = swap.fcntl.flock, []

    def late(descriptor, how):
        if not taken:
            os.rename(one, tmp_path / "gone")
            os.rename(other, one)
        taken.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(swap.fcntl, "flock", late)
    with swap.locked(one):
        monkeypatch.undo()
        assert len(taken) == 2 and (one / "what").read_text() == "b"
        with pytest.raises(UserError), swap.locked(one):
            pass
