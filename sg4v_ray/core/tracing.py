# SPDX-License-Identifier: Apache-2.0
"""Where the spans of a server go: to any OpenTelemetry collector, by OTLP over HTTP.

The standard variables (OTEL_EXPORTER_OTLP_ENDPOINT, ..._HEADERS, OTEL_SERVICE_NAME) say to which;
they must be in the environment in which Ray starts on each node. Ray Serve calls `processors` in
each of its processes, those that answer HTTP too, so this lies in the installed package.
"""

from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

EXPORTER: Final = "sg4v_ray.core.tracing:processors"
"""What Ray Serve imports."""


def processors() -> list[SpanProcessor]:
    """Return one that sends spans in batches, in a thread of its own."""
    return [BatchSpanProcessor(OTLPSpanExporter())]
