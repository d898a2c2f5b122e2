"""What lies in a bucket: the one request that restic itself cannot make for us.

ListObjectsV2, signed as AWS wants it (Signature Version 4), with nothing but the standard library.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from oned_backup import xmldoc
from oned_backup.errors import Misconfigured, OnedBackupError, PermissionDenied, Unavailable
from oned_backup.sdk.log import Secret

_TIMEOUT_S = 60.0
_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"
_MAX_PAGE_BYTES = 8 << 20

#: which parameters are meant when S3 denies something
KEYS = "RESTIC_S3_ACCESS_KEY_ID and RESTIC_S3_SECRET_ACCESS_KEY"
UNPROVED = "its certificate cannot be proved (RESTIC_S3_CACERT names the authority)"


@dataclass(frozen=True)
class Bucket:
    """A bucket and how to get at it. `endpoint`: with its scheme."""

    endpoint: str
    name: str
    region: str
    key_id: Secret
    key: Secret
    in_path: bool = False
    ca_file: str = ""
    any_certificate: bool = False

    def require(self) -> None:
        """`Misconfigured` if there is no such bucket, `PermissionDenied` if its objects may not be listed."""
        self._get({"list-type": "2", "max-keys": "1"})

    def sizes(self) -> dict[str, int]:
        """Bytes by the first part of the objects' names."""
        found: dict[str, int] = {}
        for name, size in self._objects():
            top = name.partition("/")[0]
            found[top] = found.get(top, 0) + size
        return found

    def _objects(self) -> Iterator[tuple[str, int]]:
        token = ""
        while True:
            query = {"list-type": "2", "max-keys": "1000"} | ({"continuation-token": token} if token else {})
            page = xmldoc.parse(self._get(query), what=f"list of bucket {self.name}")
            for entry in page.iterfind(f"{_NAMESPACE}Contents"):
                yield entry.findtext(f"{_NAMESPACE}Key", ""), int(entry.findtext(f"{_NAMESPACE}Size", "0"))
            token = page.findtext(f"{_NAMESPACE}NextContinuationToken", "")
            if not token:
                return

    def _get(self, query: Mapping[str, str]) -> bytes:
        parts = urlsplit(self.endpoint)
        host = parts.netloc if self.in_path else f"{self.name}.{parts.netloc}"
        path = f"/{self.name}/" if self.in_path else "/"
        text = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items()))
        request = urllib.request.Request(  # noqa: S310 - the scheme is checked by driver.toml
            f"{parts.scheme}://{host}{path}?{text}", headers=self._signed(host, path, text)
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._tls()) as answer:  # noqa: S310
                data: bytes = answer.read(_MAX_PAGE_BYTES)
                return data
        except OSError as error:  # URLError and HTTPError, too
            raise _explained(f"bucket {self.name} at {parts.netloc}", error) from error

    def _signed(self, host: str, path: str, query: str) -> dict[str, str]:
        now = dt.datetime.now(dt.UTC)
        moment, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
        empty = hashlib.sha256(b"").hexdigest()
        headers = {"host": host, "x-amz-content-sha256": empty, "x-amz-date": moment}
        names = ";".join(headers)
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        canonical = f"GET\n{path}\n{query}\n{lines}\n{names}\n{empty}"
        scope = f"{day}/{self.region}/s3/aws4_request"
        to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        key = f"AWS4{self.key.reveal()}".encode()
        for part in (day, self.region, "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
        credential = f"Credential={self.key_id.reveal()}/{scope}"
        return headers | {
            "Authorization": f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
        }

    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.any_certificate:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _explained(where: str, error: OSError) -> OnedBackupError:
    code = error.code if isinstance(error, urllib.error.HTTPError) else 0
    if code in {401, 403}:
        return PermissionDenied(f"{where}: {KEYS} do not open it (HTTP {code})")
    if code == 404:
        return Misconfigured(
            f"{where}: there is no such bucket", hint="Make it, or correct RESTIC_S3_BUCKET."
        )
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Misconfigured(f"{where}: {UNPROVED}: {reason.verify_message}")
    return Unavailable(f"{where}: {reason}")
