//! Snapshots as the API and the filters see them.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;

use super::filters::Fields;
use crate::proto::snapshots::v1::{Info, Kind as ApiKind};
use crate::store::{Kind, SnapshotRecord};

/// Nanoseconds in a second.
const NANOS: i64 = 1_000_000_000;

/// Now, in nanoseconds since 1970 (UTC).
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn timestamp(nanos: i64) -> Timestamp {
    Timestamp {
        seconds: nanos.div_euclid(NANOS),
        // In 0..NANOS by definition of the remainder.
        nanos: nanos.rem_euclid(NANOS) as i32,
    }
}

/// The API's form of a snapshot.
pub(super) fn info(name: String, record: SnapshotRecord) -> Info {
    let kind = match record.kind {
        Kind::View => ApiKind::View,
        Kind::Active => ApiKind::Active,
        Kind::Committed => ApiKind::Committed,
    };
    Info {
        name,
        parent: record.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(timestamp(record.created)),
        updated_at: Some(timestamp(record.updated)),
        labels: record.labels.into_iter().collect(),
    }
}

/// A snapshot with its key, as filters look at it.
pub(super) struct Named<'a>(pub &'a str, pub &'a SnapshotRecord);

impl Fields for Named<'_> {
    fn field(&self, path: &[Vec<u8>]) -> Option<&[u8]> {
        let Named(name, record) = self;
        let (first, rest) = path.split_first()?;
        match first.as_slice() {
            b"name" => Some(name.as_bytes()),
            b"parent" => Some(record.parent.as_deref().unwrap_or_default().as_bytes()),
            b"kind" => Some(match record.kind {
                Kind::View => b"view",
                Kind::Active => b"active",
                Kind::Committed => b"committed",
            }),
            b"labels" => {
                let key = match rest {
                    [key] => Cow::Borrowed(key.as_slice()),
                    parts => Cow::Owned(parts.join(&b'.')),
                };
                let label = record.labels.get(std::str::from_utf8(&key).ok()?)?;
                Some(label.as_bytes())
            }
            _ => None,
        }
    }
}
