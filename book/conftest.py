"""Figures under nbval, which leaves pictures out of its comparison."""

import pytest
from figures import difference, pictures
from nbval.plugin import IPyNbCell


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """After a cell has run, compare the figures that it drew with the stored ones."""
    result = yield
    if isinstance(item, IPyNbCell):
        folder = (
            item.config.rootpath / "_build" / "figures" / item.path.stem / item.name
        )
        message = difference(
            pictures(item.cell.outputs), pictures(item.test_outputs), folder
        )
        if message:
            item.raise_cell_error(
                "The figure differs from the stored one. If the change is meant, store "
                f"it: make run ONLY={item.path.stem}",
                message,
            )
    return result
