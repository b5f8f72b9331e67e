"""A hub on this machine, and who uses it."""

import pytest
from hub_client import Client, make_folder
from hub_server import LocalHub


@pytest.fixture(scope="session")
def served():
    with LocalHub() as running:
        yield running


@pytest.fixture
def hub(served):
    yield served
    served.reset()


@pytest.fixture(scope="session")
def session_client(served, tmp_path_factory):
    client = Client(served, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def client(hub, session_client):
    """A client with its caches; names of repositories are used again, their commits are not."""
    return session_client


@pytest.fixture
def new_client(hub, tmp_path):
    """``new_client(home, **variables)``: one with other variables."""
    made = []

    def start(home, **variables):
        made.append(Client(hub, tmp_path / home, **variables))
        return made[-1]

    yield start
    for client in made:
        client.close()


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "fast model é", num_labels=3)
