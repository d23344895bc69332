//! What commands about indexes found or did: one row for each layer, as a table for people or as JSON for programs.

use std::fmt::Write as _;

use serde::Serialize;

use super::status::short;
use crate::catalog::images::PlannedLayer;
use crate::config::ByteSize;

/// One line of what a command found or did.
#[derive(Debug, Default, Serialize)]
pub(super) struct Row {
    /// Digest of the layer.
    pub(super) layer: String,
    /// Bytes of its blob, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) layer_bytes: Option<u64>,
    /// Digest of the index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) index: Option<String>,
    /// Bytes of the index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) index_bytes: Option<u64>,
    /// Repository or file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) place: Option<String>,
    /// Whether it has a signature, good or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) signed: Option<bool>,
    /// Why this configuration trusts it; absent if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) trust: Option<String>,
    /// What became of it, or why there is none.
    pub(super) note: String,
}

/// What a command found or did.
pub(super) struct Report {
    pub(super) rows: Vec<Row>,
    /// Why nothing was done of what was asked for, if that is so: a failure.
    pub(super) nothing: Option<String>,
    /// What else there is to say.
    pub(super) note: Option<String>,
}

impl From<Vec<Row>> for Report {
    fn from(rows: Vec<Row>) -> Self {
        Report {
            rows,
            nothing: None,
            note: None,
        }
    }
}

pub(super) fn row_of(layer: &PlannedLayer) -> Row {
    Row {
        layer: layer.spec.digest.to_string(),
        layer_bytes: Some(layer.spec.size),
        ..Row::default()
    }
}

/// The rows as a table for people.
pub(super) fn table(rows: &[Row]) -> String {
    let mut out = String::new();
    for row in rows {
        let size = row
            .index_bytes
            .map_or_else(|| "-".to_owned(), |bytes| ByteSize(bytes).to_string());
        let share = match (row.index_bytes, row.layer_bytes) {
            (Some(index), Some(layer @ 1..)) => format!(" ({:.1} %)", index as f64 * 100.0 / layer as f64),
            _ => String::new(),
        };
        let place = row
            .place
            .as_deref()
            .map_or_else(String::new, |place| format!("{place}  "));
        // Writing into a String cannot fail.
        let _ = writeln!(out, "{}  {:>18}  {place}{}", short(&row.layer), size + &share, row.note);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_tells_of_each_layer() {
        let rows = [
            Row {
                layer: format!("sha256:{}", "a".repeat(64)),
                layer_bytes: Some(100 << 20),
                index_bytes: Some(1 << 20),
                place: Some("r.example/index".to_owned()),
                note: "pushed".to_owned(),
                ..Row::default()
            },
            Row {
                layer: format!("sha256:{}", "b".repeat(64)),
                layer_bytes: Some(1),
                note: "it is small, and fetched at once".to_owned(),
                ..Row::default()
            },
        ];
        insta::assert_snapshot!(table(&rows), @r"
        aaaaaaaaaaaa     1.0 MiB (1.0 %)  r.example/index  pushed
        bbbbbbbbbbbb                   -  it is small, and fetched at once
        ");
    }
}
