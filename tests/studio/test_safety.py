"""Who may ask the studio: the token, its own names, its own pages, and nothing but looking with --read-only."""

import pytest

pytest.importorskip("starlette", reason="the studio's extra is not installed")

from support.studios import TOKEN, asked, studio_of

from sd3pipe.studio.safety import Access


def refused(method="GET", path="/queue", query="", token=TOKEN, **headers) -> str:
    access = headers.pop("access", Access(token=TOKEN, host="127.0.0.1", port=8400))
    headers = {"host": "127.0.0.1:8400", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if token:
        headers["authorization"] = f"Bearer {token}"
    return access.refusal(method, path, headers, query)


def test_the_token_opens_the_studio_and_nothing_else_does():
    assert refused() == ""
    assert "token" in refused(token="")
    assert "token" in refused(token="another")
    assert refused(token="", query=f"token={TOKEN}") == ""
    assert refused(token="", cookie=f"sd3pipe_8400={TOKEN}") == ""
    assert "token" in refused(token="", cookie=f"sd3pipe_8401={TOKEN}")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8400", "127.0.0.1.evil.example", "", "10.0.0.1", "[::"])
def test_a_foreign_host_name_is_refused(host):
    assert "name" in refused(host=host)


@pytest.mark.parametrize("host", ["localhost:8400", "127.0.0.1", "[::1]:9000"])
def test_loopback_has_several_names_and_a_tunnel_any_port(host):
    assert refused(host=host) == ""


def test_another_site_is_refused_even_with_the_token():
    assert "another site" in refused("POST", origin="http://evil.example")
    assert "another site" in refused("POST", origin="null")
    assert "another site" in refused(sec_fetch_site="cross-site", sec_fetch_mode="no-cors")
    assert refused("POST", origin="http://127.0.0.1:8400", sec_fetch_site="same-origin") == ""
    assert "another site" in refused("POST", origin="http://127.0.0.1:9999")


def test_a_public_address_is_allowed_by_name_and_by_a_proxy_that_keeps_none():
    access = Access(token=TOKEN, host="127.0.0.1", port=8400, origin="https://studio.example")
    assert refused("POST", access=access, host="studio.example", origin="https://studio.example") == ""
    assert refused("POST", access=access, host="127.0.0.1:8400", origin="https://studio.example") == ""
    assert "another site" in refused("POST", access=access, host="studio.example", origin="https://other.example")
    assert "name" in refused(access=access, host="other.example")


def test_bound_to_the_network_it_answers_to_addresses_but_to_no_name():
    access = Access(token=TOKEN, host="0.0.0.0", port=8400)
    assert refused(access=access, host="192.168.1.7:8400") == ""
    assert "name" in refused(access=access, host="rebound.example:8400")


def test_read_only_refuses_every_change():
    access = Access(token=TOKEN, host="127.0.0.1", port=8400, read_only=True)
    assert refused(access=access) == ""
    assert "--read-only" in refused("POST", access=access)


def test_answers_bind_the_browser_and_the_token_becomes_a_cookie_of_this_port(tmp_path):
    answer = asked(studio_of(tmp_path), "GET", f"/queue?token={TOKEN}", token="")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    cookie = answer.headers["set-cookie"]
    assert "sd3pipe_8400=" in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Secure" not in cookie


def test_behind_tls_the_cookie_is_secure(tmp_path):
    studio = studio_of(tmp_path, origin="https://studio.example")
    answer = asked(studio, "GET", f"/queue?token={TOKEN}", token="", headers={"host": "studio.example"})
    assert "; Secure" in answer.headers["set-cookie"]


def test_a_stranger_gets_403_and_health_needs_no_token(tmp_path):
    studio = studio_of(tmp_path)
    assert asked(studio, "GET", "/queue", token="").status_code == 403
    assert asked(studio, "POST", "/begin/init", json={}, token="").status_code == 403
    assert asked(studio, "POST", "/begin/init", json={}, headers={"origin": "http://evil.example"}).status_code == 403
    assert asked(studio, "GET", "/healthz", token="").status_code == 200


def test_a_body_that_is_no_json_or_too_large_is_answered(tmp_path):
    studio = studio_of(tmp_path)
    form = asked(studio, "POST", "/begin/init", content=b"folder=/tmp", headers={"content-type": "text/plain"})
    assert form.status_code == 422 and "JSON" in form.json()["error"][0]
    large = asked(studio, "POST", "/begin/init", json={"folder": "x" * 5_000_000})
    assert large.status_code == 422 and "bytes" in large.json()["error"][0]
    assert asked(studio, "POST", "/begin/init", json=[1]).status_code == 422


def test_an_unknown_project_is_told(tmp_path):
    answer = asked(studio_of(tmp_path), "GET", "/p/none-123456/pictures")
    assert answer.status_code == 422 and "no such project" in answer.text
