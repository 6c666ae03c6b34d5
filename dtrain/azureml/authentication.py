"""``azureml.core.authentication``: ways to log in, which scripts name and nothing here needs."""

from __future__ import annotations

from typing import Any, ClassVar

from dtrain.azureml.console import warn
from dtrain.azureml.errors import Named, UserErrorException

NO_ACCOUNT = "there is no account to log in to"


class NoLogin(Named):
    """A way to log in: taken, and neither used nor kept, secrets least of all. Called by control scripts."""

    _differs: ClassVar = {"(...)": "its arguments are not used, and that is said: there is no account to log in to"}
    _refused: ClassVar = {
        "get_authentication_header": NO_ACCOUNT,
        "get_token": NO_ACCOUNT,
        "signed_session": NO_ACCOUNT,
    }

    def __init__(self, *_: Any, **__: Any) -> None:
        warn(f"{type(self).__name__} is not used: {NO_ACCOUNT}")


class AzureCliAuthentication(NoLogin):
    pass


class InteractiveLoginAuthentication(NoLogin):
    pass


class MsiAuthentication(NoLogin):
    pass


class ServicePrincipalAuthentication(NoLogin):
    pass


def check_login(auth: Any) -> None:
    """Raises UserErrorException for an ``auth=`` that is none of these."""
    if auth is not None and not isinstance(auth, NoLogin):
        raise UserErrorException(f"auth={type(auth).__name__}(...) has no meaning here: {NO_ACCOUNT}; leave it out")
