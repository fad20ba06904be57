"""POST /v1/responses: OpenAI's Responses, what its newest clients call by default."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from prerope.server.api.chat.parts import ArgumentsPart, Call, CallPart, ChatReply, ReasoningPart, TextPart
from prerope.server.api.chat.replies import chat_reply
from prerope.server.api.dialects.common import chat_events, check_complete
from prerope.server.api.dialects.kept_responses import keep, with_history
from prerope.server.api.dialects.lowering.responses import ResponsesRequest
from prerope.server.api.fairness import current_hold
from prerope.server.api.logprobs import chat_logprobs
from prerope.server.api.requests.reading import Read
from prerope.server.api.running import ReadyService, Running, body_of, new_id, start
from prerope.server.api.stream.generation import Token, read_all, while_connected
from prerope.server.api.stream.printing import Many, event_stream, json_response
from prerope.server.engine.outputs import FinishReason
from prerope.server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post("/responses", summary="Answer, in the shape of OpenAI's Responses")
async def responses(
    read: Annotated[Read[ResponsesRequest], Depends(body_of(ResponsesRequest, with_history))],
    request: Request,
    service: ReadyService,
) -> Response:
    """OpenAI's Responses: text and function calls, whole or as events."""
    running = await while_connected(request, start(service, read, "resp", time.perf_counter()))
    printer = _Printer(service, read.body, running)
    if read.body.stream:
        return event_stream(_events(printer), named=True)
    (reply,) = await read_all(request, running.generations)
    check_complete(reply.finish_reason)
    items = [(item, reply.tokens) for item in _items(chat_reply(running, reply))]
    return await json_response(await printer.finished(items, reply.finish_reason))


class _Printer:
    """Prints one response in its states."""

    def __init__(self, service: Service, body: ResponsesRequest, running: Running) -> None:
        self._service, self.body, self.running = service, body, running
        hold = current_hold()  # a stream is printed outside of its request
        self._tenant, self._line = hold.tenant, hold.line
        self._model, self._created = service.model_name, int(time.time())

    def response(self, status: str, output: list[Any], **more: Any) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.running.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            **body.repeated(),
            "top_p": body.top_p,
            "truncation": body.truncation,
            "top_logprobs": body.top_logprobs or 0,
            "usage": None,
            **more,
        }

    def scores(self, tokens: Sequence[Token]) -> Many | list[Any]:
        """Log-probabilities, where they are asked for."""
        if self.body.num_logprobs is None or not tokens:
            return []
        told: Many = chat_logprobs(self._service.tokenizer, tokens, self.body.num_logprobs)["content"]
        return told

    async def finished(
        self, items: Sequence[tuple[dict[str, Any], Sequence[Token]]], reason: FinishReason
    ) -> dict[str, Any]:
        """The whole response of these items, each with its tokens; it is kept where it may be."""
        status, output = _status(reason), [item for item, _ in items]
        output[-1]["status"] = status  # what stands before the last item was written to its end
        details = None if status == "completed" else {"reason": "max_output_tokens"}
        response = self.response(status, output, incomplete_details=details, usage=self._usage())
        if self.body.store:
            await keep(self._service, self._tenant, self._line, self.body.kept(), response)
        for item, tokens in items:
            if item["type"] == "message":
                item["content"][0]["logprobs"] = self.scores(tokens)
        return response

    def _usage(self) -> dict[str, Any]:
        usage = self.running.generations[0].usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _status(reason: FinishReason) -> str:
    return "completed" if reason is FinishReason.STOP else "incomplete"


def _items(reply: ChatReply) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if reply.reasoning:
        items.append(reasoning_item(new_id("rs"), reply.reasoning, "completed"))
    if reply.text or (not items and not reply.calls):
        items.append(message_item(new_id("msg"), reply.text, "completed"))
    return items + [call_item(new_id("fc"), one, "completed") for one in reply.calls]


def message_item(item_id: str, text: str, status: str) -> dict[str, Any]:
    content = [text_part(text)] if text or status != "in_progress" else []
    return {"type": "message", "id": item_id, "status": status, "role": "assistant", "content": content}


def reasoning_item(item_id: str, text: str, status: str) -> dict[str, Any]:
    content = [thought_part(text)] if text else []
    return {"type": "reasoning", "id": item_id, "status": status, "summary": [], "content": content}


def thought_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(item_id: str, one: Call, status: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": item_id,
        "call_id": one.id,
        "name": one.name,
        "arguments": one.arguments,
        "status": status,
    }


class _OpenItem:
    """An item of a stream, from its first event to its last."""

    def __init__(self, printer: _Printer, index: int, call: Call | None, *, thoughts: bool = False) -> None:
        self._printer, self.index, self.call, self.text, self.thoughts = printer, index, call, "", thoughts
        self.tokens = list[Token]()
        self.id = new_id("rs" if thoughts else "msg" if call is None else "fc")

    @property
    def is_text(self) -> bool:
        return self.call is None and not self.thoughts

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}

    @property
    def text_place(self) -> dict[str, Any]:
        return {**self.place, "content_index": 0}

    def bare(self, status: str) -> dict[str, Any]:
        """Without log-probabilities."""
        if self.call is not None:
            return call_item(self.id, self.call, status)
        return (reasoning_item if self.thoughts else message_item)(self.id, self.text, status)

    def item(self, status: str) -> dict[str, Any]:
        item = self.bare(status)
        if self.is_text and item["content"]:
            item["content"] = [self._part()]
        return item

    def _part(self) -> dict[str, Any]:
        if self.thoughts:
            return thought_part(self.text)
        return {**text_part(self.text), "logprobs": self._printer.scores(self.tokens)}

    def _event(self, name: str, tokens: Sequence[Token], **more: Any) -> dict[str, Any]:
        """One event about the item's text."""
        if self.thoughts:
            return {"type": f"response.reasoning_text.{name}", **self.text_place, **more}
        told = {"logprobs": self._printer.scores(tokens)}
        return {"type": f"response.output_text.{name}", **self.text_place, **more, **told}

    def begin(self) -> Iterator[dict[str, Any]]:
        yield {"type": "response.output_item.added", "output_index": self.index, "item": self.item("in_progress")}
        if self.call is None:
            yield {"type": "response.content_part.added", **self.text_place, "part": self._part()}

    def more(self, text: str, tokens: Sequence[Token] = ()) -> dict[str, Any]:
        if self.call is None:
            self.text += text
            self.tokens += tokens
            return self._event("delta", tokens, delta=text)
        self.call.arguments += text
        return {"type": "response.function_call_arguments.delta", **self.place, "delta": text}

    def end(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        if self.call is None:
            yield self._event("done", self.tokens, text=self.text)
            yield {"type": "response.content_part.done", **self.text_place, "part": self._part()}
        else:
            named = {"name": self.call.name, "arguments": self.call.arguments}
            yield {"type": "response.function_call_arguments.done", **self.place, **named}
        yield {"type": "response.output_item.done", "output_index": self.index, "item": self.item(status)}


async def _events(printer: _Printer) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a response, numbered."""
    number = 0
    async for event in _unnumbered(printer):
        yield {**event, "sequence_number": number}
        number += 1


def _next_item(
    printer: _Printer, items: list[_OpenItem], call: Call | None, *, thoughts: bool = False
) -> Iterator[dict[str, Any]]:
    """End the item that is open, and begin another."""
    if items:
        yield from items[-1].end()
    items.append(_OpenItem(printer, len(items), call, thoughts=thoughts))
    yield from items[-1].begin()


async def _unnumbered(printer: _Printer) -> AsyncGenerator[dict[str, Any], None]:
    begun = printer.response("in_progress", [])
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    items, untold, reason = list[_OpenItem](), list[Token](), FinishReason.ABORT
    async for piece, parts in chat_events(printer.running):
        untold += piece.tokens
        for part in parts:
            events: list[dict[str, Any]] = []
            match part:
                case TextPart(text) if text:
                    if not items or not items[-1].is_text:
                        events += _next_item(printer, items, None)
                    events.append(items[-1].more(text, untold))
                    untold = []
                case ReasoningPart(text) if text:
                    if not items:
                        events += _next_item(printer, items, None, thoughts=True)
                    events.append(items[-1].more(text))
                case CallPart(_, call_id, name):
                    events += _next_item(printer, items, Call(call_id, name))
                case ArgumentsPart(_, text):
                    events.append(items[-1].more(text))
            for event in events:
                yield event
        reason = piece.finish_reason or reason
    check_complete(reason)
    for event in () if items else _next_item(printer, items, None):
        yield event
    items[-1].tokens += untold
    for event in items[-1].end(_status(reason)):
        yield event
    whole = await printer.finished([(item.bare("completed"), item.tokens) for item in items], reason)
    yield {"type": f"response.{whole['status']}", "response": whole}
