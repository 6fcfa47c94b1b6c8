"""The bytes of the picture in a request, counted as they come: a form's file, the body itself, or base64 in JSON."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

ENVELOPE = 1 << 16  # bytes of a request beside the picture's


async def picture_bytes(request: Request, max_bytes: int) -> bytes:
    """Raises HTTPException: 413 for a picture of more than `max_bytes`, as soon as that is known; 415 for a compressed
    body; 400 for a form or JSON that holds no picture, and for an empty body."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HTTPException(415, "Content-Encoding: expected none, a picture is compressed already")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        data = await _form_file(request, max_bytes)
    elif kind == "application/json":
        text = await _body(request, max_bytes * 4 // 3 + ENVELOPE, max_bytes)
        data = await asyncio.to_thread(_from_json, text)
    else:
        data = await _body(request, max_bytes, max_bytes)
    if len(data) > max_bytes:
        raise _too_long(max_bytes)
    if not data:
        raise HTTPException(400, "the picture is empty")
    return data


def _too_long(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"the picture has more than {max_bytes:,} bytes")


async def _counted(request: Request, most: int, max_bytes: int) -> AsyncGenerator[bytes, None]:
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_long(max_bytes)
    seen = 0
    async for chunk in request.stream():
        seen += len(chunk)
        if seen > most:
            raise _too_long(max_bytes)
        yield chunk


async def _body(request: Request, most: int, max_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in _counted(request, most, max_bytes):
        data += chunk
    return bytes(data)


async def _form_file(request: Request, max_bytes: int) -> bytes:
    chunks = _counted(request, max_bytes + ENVELOPE, max_bytes)
    parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=16, max_part_size=ENVELOPE)
    parser.spool_max_size = max_bytes + ENVELOPE  # in memory, which is counted: never on a disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"multipart/form-data: {error.message}") from None
    try:
        for value in form.values():
            if isinstance(value, UploadFile):
                return await value.read()
    finally:
        await form.close()
    raise HTTPException(400, "multipart/form-data: expected one file, got none")


def _from_json(text: bytes) -> bytes:
    """The picture of {"image": "<base64>"}, also as a data: address."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    image = content.get("image") if isinstance(content, dict) else None
    if not isinstance(image, str):
        raise HTTPException(400, 'expected {"image": "<base64 of the picture>"}')
    if image.startswith("data:"):
        image = image.partition(",")[2]
    try:
        return base64.b64decode(image, validate=True)
    except ValueError:
        raise HTTPException(400, "image: not base64") from None
