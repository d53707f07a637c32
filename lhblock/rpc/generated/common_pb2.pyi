from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class SyncFileInfo(_message.Message):
    __slots__ = ("from_file_name", "to_file_name", "actual_size")
    FROM_FILE_NAME_FIELD_NUMBER: _ClassVar[int]
    TO_FILE_NAME_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    from_file_name: str
    to_file_name: str
    actual_size: int
    def __init__(self, from_file_name: _Optional[str] = ..., to_file_name: _Optional[str] = ..., actual_size: _Optional[int] = ...) -> None: ...
