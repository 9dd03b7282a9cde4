"""GET /v1/models and GET /v1/models/{model}."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic_core import to_json
from typing_extensions import TypedDict

from .endpoint import Endpoint

if TYPE_CHECKING:
    from .call import Call
    from .service import Service


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


def _model_of(service: Service) -> Model:
    return {"id": service.model_name, "object": "model", "created": service.created, "owned_by": "sagellm"}


async def list_models(call: Call) -> None:
    models: ModelList = {"object": "list", "data": [_model_of(call.service)]}
    await call.answer(200, to_json(models))


async def show_model(call: Call) -> None:
    call.service.check_model(call.rest)
    await call.answer(200, to_json(_model_of(call.service)))


LIST = Endpoint("GET", "/v1/models", "List the model", list_models, ModelList)
SHOW = Endpoint("GET", "/v1/models/{model}", "Describe the model", show_model, Model, statuses=(404,))
