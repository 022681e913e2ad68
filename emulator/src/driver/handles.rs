//! Tables from the opaque handles that a program holds to the objects behind them.
//!
//! A handle is a number that is never reused in a process, so that use after destruction is always recognised.

use super::call::{Answer, refuse};
use super::codes::Code;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};

/// Handles look like addresses, far from those of the allocator and of devices.
const FIRST: usize = 0xc0da_0000_0000;
const STEP: usize = 16;
static NEXT: AtomicUsize = AtomicUsize::new(FIRST);

/// A fresh handle.
pub fn fresh() -> usize {
    NEXT.fetch_add(STEP, Ordering::Relaxed)
}

pub struct Table<T> {
    what: &'static str,
    items: RwLock<BTreeMap<usize, Arc<T>>>,
}

impl<T> Table<T> {
    pub const fn new(what: &'static str) -> Self {
        Table { what, items: RwLock::new(BTreeMap::new()) }
    }

    pub fn insert(&self, handle: usize, item: Arc<T>) -> *mut c_void {
        self.items.write().unwrap().insert(handle, item);
        handle as *mut c_void
    }

    pub fn get(&self, handle: *mut c_void) -> Answer<Arc<T>> {
        match self.items.read().unwrap().get(&(handle as usize)) {
            Some(item) => Ok(item.clone()),
            None => self.unknown(handle),
        }
    }

    pub fn remove(&self, handle: *mut c_void) -> Answer<Arc<T>> {
        match self.items.write().unwrap().remove(&(handle as usize)) {
            Some(item) => Ok(item),
            None => self.unknown(handle),
        }
    }

    /// Removes and returns all objects that `which` selects, in the order of creation.
    pub fn take(&self, which: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let mut items = self.items.write().unwrap();
        let picked: Vec<usize> = items.iter().filter(|(_, item)| which(item)).map(|(&handle, _)| handle).collect();
        picked.iter().filter_map(|handle| items.remove(handle)).collect()
    }

    pub fn all(&self) -> Vec<Arc<T>> {
        self.items.read().unwrap().values().cloned().collect()
    }

    fn unknown<U>(&self, handle: *mut c_void) -> Answer<U> {
        let (what, number) = (self.what, handle as usize);
        if number == 0 {
            refuse(Code::INVALID_HANDLE, format!("the {what} is null"))
        } else if (FIRST..NEXT.load(Ordering::Relaxed)).contains(&number) {
            refuse(
                Code::INVALID_HANDLE,
                format!("{number:#x} is no live {what}: it was destroyed, or is another kind of handle"),
            )
        } else {
            refuse(Code::INVALID_HANDLE, format!("{number:#x} was never a {what} of this driver"))
        }
    }
}
