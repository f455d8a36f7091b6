"""Fixtures of every test, for processes that run tests: pytest-xdist's first process only hands tests out."""

import functools

import pytest


def pytest_configure(config):
    """Import them with all that they import, which takes seconds, where they are needed."""
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of two workers, give one all files that fork processes: the server of its forks takes 5 s to start."""
    if config.getoption("dist") != "loadfile" or config.getoption("numprocesses") > 2:
        return None
    from xdist.scheduler import LoadFileScheduling

    @functools.cache
    def group(file):
        return "forks" if "spawned" in (config.rootpath / file).read_text() else file

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return group(super()._split_scope(nodeid))

    return Scheduling(config, log)
