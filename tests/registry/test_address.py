import ssl

import pytest

from registry.address import RedisAddress


@pytest.mark.parametrize(
    ("url", "shown", "for_kombu"),
    [
        ("redis://h", "redis://h:6379", "redis://h:6379/0"),
        ("redis://u:p%23%40@h:6380/3", "redis://h:6380/3", "redis://u:p%23%40@h:6380/3"),
        ("redis://h?db=4", "redis://h:6379/4", "redis://h:6379/4"),
        ("redis://[::1]:1/0", "redis://[::1]:1", "redis://[::1]:1/0"),
        ("unix://:pw@/s?db=2", "unix:///s/2", "redis+socket://:pw@/s?virtual_host=2"),
        ("rediss://h/1", "rediss://h:6379/1", "rediss://h:6379/1?ssl_cert_reqs=CERT_REQUIRED"),
        (
            "rediss://h/1?ssl_cert_reqs=none",
            "rediss://h:6379/1",
            "rediss://h:6379/1?ssl_cert_reqs=CERT_NONE",
        ),
        (
            "rediss://h/1?ssl_ca_certs=/etc/ca.pem",
            "rediss://h:6379/1",
            "rediss://h:6379/1?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs=%2Fetc%2Fca.pem",
        ),
    ],
)
def test_one_address_is_written_as_each_client_reads_it(
    url: str, shown: str, for_kombu: str
) -> None:
    address = RedisAddress.of(url)
    assert (str(address), address.for_kombu) == (shown, for_kombu)


def test_sentinels_are_named_with_the_server_that_they_know() -> None:
    address = RedisAddress.of(
        "redis+sentinel://u:p%23@a,[::1]:7/main/2?sentinel_password=s3cret",
    )
    assert str(address) == "redis+sentinel://a,[::1]:7/main/2"
    assert address.for_kombu == "sentinel://u:p%23@a:26379/2;sentinel://u:p%23@[::1]:7/2"
    assert address.kombu_options["master_name"] == "main"
    assert address.kombu_options["sentinel_kwargs"]["password"] == "s3cret"
    assert "s3cret" not in repr(address)
    assert "p#" not in repr(address)


def test_certificates_are_looked_at_unless_somebody_says_otherwise() -> None:
    assert RedisAddress.of("rediss://h").verifying is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://h", "has to begin with redis://"),
        ("h:6379", "has to begin with redis://"),
        ("redis://", "names no host"),
        ("redis+sentinel://:s3cret@h:26379", "no address of Sentinels"),
        ("redis+sentinel://:s3cret@h:port/main", "no address of Sentinels"),
        ("redis+sentinel://:s3cret@h,/main", "no address of Sentinels"),
        ("redis+sentinel://:s3cret@h/main?master=2", "no address of Sentinels"),
        ("redis://:s3cret@h:port/0", "is no address of Redis"),
        ("rediss://h?ssl_cert_reqs=perhaps", "ssl_cert_reqs is one of"),
    ],
)
def test_what_is_no_address_is_said_without_its_secrets(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        RedisAddress.of(url)
    assert "s3cret" not in str(told.value)
