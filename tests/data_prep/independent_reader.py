"""Reads TFRecord files with nothing of data_prep: the frames as TensorFlow documents them, the Examples by protobuf."""

import struct

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

# tensorflow/core/example: field numbers and types; a map is on the wire a repeated message of key and value.
_SCHEMA = """
name: "example.proto" package: "oracle" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature"
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".oracle.BytesList" }
  field { name: "float_list" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".oracle.FloatList" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".oracle.Int64List" } }
message_type { name: "Entry"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".oracle.Feature" } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".oracle.Entry" } }
message_type { name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".oracle.Features" } }
"""
_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
_EXAMPLE = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("oracle.Example"))


def examples(path):
    """Feature name -> list of values, of every record of a file."""
    content, place = path.read_bytes(), 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        assert _masked(content[place : place + 8]) == content[place + 8 : place + 12]
        record = content[place + 12 : place + 12 + length]
        place += length + 16
        assert len(record) == length and _masked(record) == content[place - 4 : place]
        example = {}
        for entry in _EXAMPLE.FromString(record).features.feature:
            held = [values.value for _, values in entry.value.ListFields()]
            example[entry.key] = list(held[0]) if held else []
        yield example


def _masked(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
