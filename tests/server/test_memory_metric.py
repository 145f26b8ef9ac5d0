"""Planned and actual memory as gauges."""

from __future__ import annotations

from conftest import Server


async def test_planned_and_actual_bytes_are_gauges():
    text = (await Server().client.get("/metrics")).text
    labels = 'engine="0",kind="{}",model_name="org/fake",tag="weights"'
    assert f"trimaran:memory_bytes{{{labels.format('planned')}}} 100.0" in text
    assert f"trimaran:memory_bytes{{{labels.format('actual')}}} 103.0" in text


async def test_an_engine_that_loads_has_none():
    server = Server()
    server.model.ready = False
    text = (await server.client.get("/metrics")).text
    assert "trimaran:memory_bytes{" not in text
