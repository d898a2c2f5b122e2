"""A private S3 service with TLS on a loopback port, for tests.

    with S3(directory) as s3:
        s3.make_bucket("backups")
        restic --repo s3:{s3.endpoint}/backups/7 --cacert {s3.ca_file} …

It is moto's server, which keeps everything in memory. It knows one account, `key_id` and `key`, and
refuses what is not signed with that. From outside of this process, for the kit's store files:

    python share/lab/s3.py DIRECTORY make-bucket NAME
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"
_REGION = "us-east-1"
_MAY_EVERYTHING = json.dumps(
    {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
)


class S3:
    """One service, its certificates and its account in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca_file = directory / "ca.pem"
        self.endpoint = ""
        self.key_id = ""
        self.key = ""
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        from lab import wait_for  # noqa: PLC0415 - not for the command

        self.directory.mkdir(exist_ok=True)
        _write_certificates(self.directory)
        with socket.socket() as taken:
            taken.bind((HOST, 0))
            port = taken.getsockname()[1]
        self.endpoint = f"https://{HOST}:{port}"
        argv = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
        argv += ["-c", str(self.directory / "server.pem"), "-k", str(self.directory / "server.key")]
        # the account's four requests are not refused, all others are
        environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "3"}
        with (self.directory / "log").open("ab") as log:
            self._server = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
        wait_for("S3", lambda: self._listens(port), 30)
        iam = self._client("iam", "nobody", "nobody")
        iam.create_user(UserName="backup")
        iam.put_user_policy(UserName="backup", PolicyName="all", PolicyDocument=_MAY_EVERYTHING)
        made = iam.create_access_key(UserName="backup")["AccessKey"]
        self.key_id, self.key = made["AccessKeyId"], made["SecretAccessKey"]
        account = {"endpoint": self.endpoint, "key_id": self.key_id, "key": self.key}
        (self.directory / "account").write_text(json.dumps(account))
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(10)

    @classmethod
    def running_in(cls, directory: Path) -> Self:
        """The service that another process has started."""
        found = cls(directory)
        for name, value in json.loads((directory / "account").read_text()).items():
            setattr(found, name, value)
        return found

    def make_bucket(self, name: str) -> None:
        """A new bucket."""
        self._client("s3", self.key_id, self.key).create_bucket(Bucket=name)

    def objects(self, bucket: str) -> list[str]:
        """The names of what lies in a bucket."""
        pages = self._client("s3", self.key_id, self.key).get_paginator("list_objects_v2")
        return [one["Key"] for page in pages.paginate(Bucket=bucket) for one in page.get("Contents", ())]

    def _client(self, service: str, key_id: str, key: str) -> Any:
        import boto3  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: PLC0415

        return boto3.client(
            service,
            region_name=_REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=key_id,
            aws_secret_access_key=key,
            verify=str(self.ca_file),
        )

    def _listens(self, port: int) -> bool:
        if self._server is None or self._server.poll() is not None:
            raise RuntimeError(f"moto's server ended:\n{(self.directory / 'log').read_text()[-2000:]}")
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) == 0


def _write_certificates(directory: Path) -> None:
    """A certificate authority of our own (`ca.pem`), and what it has issued to the server."""
    ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = _certificate("lab CA", ca_key, "lab CA", ca_key, is_ca=True)
    server = _certificate(HOST, server_key, "lab CA", ca_key, is_ca=False)
    (directory / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (directory / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    (directory / "server.key").write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_ca: bool,
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
    if not is_ca:
        address = x509.IPAddress(ipaddress.ip_address(name))
        made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    return made.sign(issuer_key, hashes.SHA256())


if __name__ == "__main__":
    where, verb, what = sys.argv[1:]
    if verb != "make-bucket":
        sys.exit("usage: s3.py DIRECTORY make-bucket NAME")
    S3.running_in(Path(where)).make_bucket(what)
