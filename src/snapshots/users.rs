//! Which owners a container in a user namespace is to see: the labels in which containerd says so.
//!
//! Each is a list of `container id:host id:length`, separated by commas, as `/proc/<pid>/uid_map` has them. containerd sets both, and only then
//! anything is mapped. They are meant for containers: what a layer is unpacked in may have them too, since containerd hands on what an image's
//! manifest says in annotations with that prefix, and there they mean nothing.
//!
//! Without the capability `remap-ids` in its configuration containerd changes all owners by itself, in a snapshot of its own, which it commits
//! under the name that it prepared it under less `-remap`; what is made on that has the labels all the same, and is not to be mapped again.

use std::collections::BTreeMap;

use super::SnapshotsError;
use super::error::quoted;
use super::rules::REF_LABEL;
use crate::sys::SysError;
use crate::sys::idmap::{IdRange, RANGES_MAX, UserNamespace};

/// Label of the mapping of users.
const USERS_LABEL: &str = "containerd.io/snapshot/uidmapping";
/// Label of the mapping of groups.
const GROUPS_LABEL: &str = "containerd.io/snapshot/gidmapping";
/// Longest mapping, in bytes: the kernel takes less than a page at once.
const TEXT_MAX: usize = 4095;
/// What the key ends with under which containerd changes the owners of all files.
const REMAP: &str = "-remap";

/// A mapping of users and groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
}

impl Mapping {
    /// What the labels of a snapshot say; `None` if nothing is to be mapped.
    pub fn of(labels: &BTreeMap<String, String>) -> Result<Option<Self>, SnapshotsError> {
        if labels.contains_key(REF_LABEL) {
            return Ok(None);
        }
        match [USERS_LABEL, GROUPS_LABEL].map(|label| labels.get(label)) {
            [None, None] => Ok(None),
            [Some(users), Some(groups)] => Ok(Some(Mapping {
                users: ranges(USERS_LABEL, users)?,
                groups: ranges(GROUPS_LABEL, groups)?,
            })),
            _ => Err(SnapshotsError::invalid(format!(
                "of the labels {USERS_LABEL} and {GROUPS_LABEL} there is only one; both are needed, or none"
            ))),
        }
    }

    /// What user and group 0 are seen as.
    pub fn root(&self) -> (u32, u32) {
        (outside(&self.users), outside(&self.groups))
    }

    /// A user namespace with this mapping.
    pub fn namespace(&self) -> Result<UserNamespace, SysError> {
        UserNamespace::new(&self.users, &self.groups)
    }
}

/// Whether two sets of labels say the same of owners.
pub(super) fn same_owners(a: &BTreeMap<String, String>, b: &BTreeMap<String, String>) -> bool {
    let said = |labels: &BTreeMap<String, String>| match labels.contains_key(REF_LABEL) {
        true => [None, None],
        false => [USERS_LABEL, GROUPS_LABEL].map(|label| labels.get(label).cloned()),
    };
    said(a) == said(b)
}

/// Whether a snapshot with these labels may have mounts of its own.
pub(super) fn is_labelled(labels: &BTreeMap<String, String>) -> bool {
    labels.contains_key(USERS_LABEL)
}

/// Whether the snapshot `key` that is committed as `name` is one in which containerd has changed all owners.
pub(super) fn is_remap(key: &str, name: &str) -> bool {
    // Behind the namespace and a number, if they are there.
    let own = |key| str::splitn(key, 3, '/').nth(2).unwrap_or(key);
    own(key).strip_suffix(REMAP) == Some(own(name))
}

/// What id 0 is seen as; [`ranges`] has seen to it that it is mapped.
fn outside(ranges: &[IdRange]) -> u32 {
    let zero = ranges.iter().find(|range| range.inside == 0);
    zero.map_or(u32::MAX, |range| range.outside)
}

fn ranges(label: &str, text: &str) -> Result<Vec<IdRange>, SnapshotsError> {
    let invalid = |problem: &str| SnapshotsError::invalid(format!("label {label} is {:?}: {problem}", quoted(text)));
    if text.len() > TEXT_MAX {
        return Err(invalid("it is longer than the kernel takes (4095 bytes)"));
    }
    let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
    let ranges = ranges.ok_or_else(|| {
        invalid(
            "it has to be a list of container id:host id:length, of numbers from 0 to 4294967294, none of them empty",
        )
    })?;
    if ranges.len() > RANGES_MAX {
        return Err(invalid("the kernel takes no more than 340 ranges"));
    }
    let overlap = |first: fn(&IdRange) -> u32| {
        let mut sorted: Vec<_> = ranges.iter().map(|range| (first(range), range.count)).collect();
        sorted.sort_unstable();
        sorted.windows(2).any(|pair| match pair {
            [(a, count), (b, _)] => b - a < *count,
            _ => false,
        })
    };
    if overlap(|range| range.inside) || overlap(|range| range.outside) {
        return Err(invalid("ranges overlap"));
    }
    if !ranges.iter().any(|range| range.inside == 0) {
        return Err(invalid("id 0 of the container is not mapped"));
    }
    Ok(ranges)
}

/// One range; `None` if it is none, is empty, or goes beyond the last id (the one after that means "no id").
fn range(text: &str) -> Option<IdRange> {
    let number = |digits: &str| {
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| digits.parse::<u32>().ok()).flatten()
    };
    let mut numbers = text.split(':').map(number);
    let (inside, outside, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
    let fits = |first: u32| first.checked_add(count).is_some();
    let whole = numbers.next().is_none() && count > 0 && fits(inside) && fits(outside);
    whole.then_some(IdRange { inside, outside, count })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tonic::Code;

    use super::*;

    fn labels(labels: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned()));
        owned.collect()
    }

    fn both(text: &str) -> Result<Option<Mapping>, SnapshotsError> {
        Mapping::of(&labels(&[(USERS_LABEL, text), (GROUPS_LABEL, "0:7:1")]))
    }

    #[test]
    fn labels_are_read_as_containerd_writes_them() {
        assert_eq!(Mapping::of(&labels(&[("l", "v")])).unwrap(), None);
        let mapping = both("0:100000:65536").unwrap().unwrap();
        assert_eq!(mapping.root(), (100_000, 7));
        let mapping = both("1000:1000:1,0:200000:1000,1001:201001:64535").unwrap().unwrap();
        assert_eq!(mapping.root(), (200_000, 7));
        assert_eq!(mapping.users.len(), 3);
        // All ids there are.
        both("0:0:4294967295").unwrap().unwrap();
        // An image's annotations may say anything; a layer is unpacked in spite of that.
        let unpacking = [(USERS_LABEL, "nonsense"), (REF_LABEL, "sha256:1")];
        assert_eq!(Mapping::of(&labels(&unpacking)).unwrap(), None);
    }

    #[test]
    fn bad_labels_are_refused_with_the_reason() {
        let many = (0..341).map(|id| format!("{id}:{id}:1")).collect::<Vec<_>>().join(",");
        let list = "has to be a list";
        for (text, reason) in [
            ("", list),
            ("0", list),
            ("0:1", list),
            ("0:1:2:3", list),
            ("0:1:0", list),
            ("0:-1:5", list),
            ("0:+1:5", list),
            ("0: 1:5", list),
            ("0:1:5,", list),
            ("0:1:4294967296", list),
            ("0:1:4294967295", list),
            ("4294967295:1:1", list),
            ("0:100:10,9:200:10", "overlap"),
            ("0:100:10,10:109:10", "overlap"),
            ("0:1:1,0:1:1", "overlap"),
            ("1:100:10", "id 0"),
            (many.as_str(), "340 ranges"),
            (&"0:0:1,".repeat(700), "longer"),
        ] {
            let error = both(text).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{text}");
            let told = error.to_string();
            assert!(told.contains(USERS_LABEL) && told.contains(reason), "{told}");
        }
        for one in [USERS_LABEL, GROUPS_LABEL] {
            let error = Mapping::of(&labels(&[(one, "0:1:1")])).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn containerds_own_remapping_is_known_by_its_keys() {
        assert!(is_remap("default/7/sha256:ab-remap", "default/8/sha256:ab"));
        assert!(is_remap("x-remap", "x"));
        assert!(is_remap("k8s.io/7/sha256:ab-5-6-remap", "k8s.io/9/sha256:ab-5-6"));
        assert!(!is_remap("default/7/sha256:ab-remap", "default/8/sha256:cd"));
        assert!(!is_remap("default/7/sha256:ab", "default/8/sha256:ab"));
        assert!(!is_remap("default/7/extract-1 sha256:ab", "default/8/sha256:ab"));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[0-9:,+ -]{0,60}") {
            let _ = both(&text);
        }

        #[test]
        fn what_is_taken_maps_each_id_once(
            numbers in prop::collection::vec((0_u32..40, 0_u32..40, 0_u32..12), 1..5),
        ) {
            let text: Vec<_> = numbers.iter().map(|(a, b, count)| format!("{a}:{b}:{count}")).collect();
            let once = |first: fn(&(u32, u32, u32)) -> u32| {
                let mut ids: Vec<_> = numbers.iter().flat_map(|range| first(range)..first(range) + range.2).collect();
                let all = ids.len();
                ids.sort_unstable();
                ids.dedup();
                ids.len() == all
            };
            let expected = numbers.iter().all(|range| range.2 > 0)
                && numbers.iter().any(|range| range.0 == 0)
                && once(|range| range.0)
                && once(|range| range.1);
            prop_assert_eq!(both(&text.join(",")).is_ok(), expected);
        }
    }
}
