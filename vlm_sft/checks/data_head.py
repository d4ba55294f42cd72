"""Check the first records of every file before the model is loaded."""

from itertools import islice

from vlm_sft.config.schema import RunConfig
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.images import open_image
from vlm_sft.data.records import read_records
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import ImageError, RecordError

HEAD_RECORDS = 16
"""Records of each file that are read, tokenized and opened before the model is loaded."""


def check_data_head(config: RunConfig, chat_tokenizer: ChatTokenizer) -> None:
    """Read, tokenize and open the images of each file's first records, before any model is loaded.

    Raises:
        UserError: A file cannot be read.
        RecordError: A record cannot be used and `data.on_error` is `stop`.
    """
    for file in config.data.files:
        for record in islice(read_records(file), HEAD_RECORDS):
            error = record_fault(record, chat_tokenizer)
            if error is not None and config.data.on_error == "stop":
                raise error


def record_fault(
    record: Conversation | RecordError, chat_tokenizer: ChatTokenizer
) -> RecordError | None:
    """Return what is wrong with a record: its format, its tokenization or one of its images."""
    if isinstance(record, RecordError):
        return record
    try:
        chat_tokenizer.tokenize(record)
        for source in record.images:
            open_image(source)
    except RecordError as error:
        return error
    except ImageError as error:
        return RecordError(error.reason, str(error), record_id=record.id, where=record.where)
    return None
