"""Rows to conversations: which fields a row of each format has, whether they are right, and what is wrong where not.

`detection` finds the one format of a source in its first rows, `conversation` and `messages` read rows of text, `tokens` rows of
token ids; `checks` holds what they all ask of a value. `docs/formats.md` shows a row of each.
"""

from goldsmith.data.formats.conversation import RowConverter
from goldsmith.data.formats.detection import SAMPLE_ROWS, detect_format
from goldsmith.data.formats.messages import ROLES

__all__ = ["ROLES", "SAMPLE_ROWS", "RowConverter", "detect_format"]
