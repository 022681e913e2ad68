//! User objects: a destructor that runs when the last graph that needs the object is gone.
//!
//! References are held by the program, graphs, executable graphs and captures under way. The thread that returns the
//! last one runs the destructor, which, as the manual says, must not call the driver.

use super::call::{self, Answer, exports, give, refuse};
use super::codes::Code;
use super::graph;
use super::handles;
use super::state::{Handle, driver};
use std::ffi::{c_uint, c_void};
use std::sync::{Arc, Mutex};

pub struct UserObject {
    handle: usize,
    data: usize,
    destroy: unsafe extern "C" fn(*mut c_void),
    references: Mutex<u64>,
}

impl UserObject {
    fn retain(&self, count: u64) {
        *self.references.lock().unwrap() += count;
    }

    /// Drops references; the last one runs the destructor.
    fn release(&self, count: u64) -> Answer {
        {
            let mut references = self.references.lock().unwrap();
            if count > *references {
                return refuse(
                    Code::INVALID_VALUE,
                    format!("{count} references cannot be given back, the object has {references}"),
                );
            }
            *references -= count;
            if *references > 0 {
                return Ok(());
            }
        }
        driver()?.user_objects.remove(self.handle as Handle)?;
        // SAFETY: the program guarantees that its destructor may be called once with its data; the last reference is
        // gone.
        call::as_host_function(|| unsafe { (self.destroy)(self.data as *mut c_void) });
        Ok(())
    }
}

/// The user objects of a graph.
#[derive(Default)]
pub struct Objects(Mutex<Vec<(Arc<UserObject>, u64)>>);

impl Objects {
    fn add(&self, object: Arc<UserObject>, count: u64) {
        self.0.lock().unwrap().push((object, count));
    }

    fn give_back(&self, object: &UserObject, count: u64) -> Answer {
        let mut held = self.0.lock().unwrap();
        let own = |entry: &&mut (Arc<UserObject>, u64)| entry.0.handle == object.handle;
        let all: u64 = held.iter_mut().filter(own).map(|entry| entry.1).sum();
        if count > all {
            return refuse(Code::INVALID_VALUE, format!("the graph holds {all} references to the object, not {count}"));
        }
        let mut left = count;
        for entry in held.iter_mut().filter(own) {
            let taken = left.min(entry.1);
            entry.1 -= taken;
            left -= taken;
        }
        drop(held);
        object.release(count)
    }
}

impl Clone for Objects {
    fn clone(&self) -> Self {
        let held = self.0.lock().unwrap().clone();
        held.iter().for_each(|(object, count)| object.retain(*count));
        Objects(Mutex::new(held))
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        for (object, count) in self.0.get_mut().map(std::mem::take).unwrap_or_default() {
            // Fails only if too many references were dropped, which was refused then.
            let _ = object.release(count);
        }
    }
}

fn refuse_none(count: c_uint) -> Answer {
    match count {
        0 => refuse(Code::INVALID_VALUE, "the count of references is 0"),
        _ => Ok(()),
    }
}

const NO_DESTRUCTOR_SYNC: c_uint = 1;
const MOVE: c_uint = 1;

exports! { USER_OBJECT:
    fn cuUserObjectCreate(
        object: *mut Handle, data: *mut c_void, destroy: Option<unsafe extern "C" fn(*mut c_void)>,
        references: c_uint, flags: c_uint,
    ) {
        refuse_none(references)?;
        let Some(destroy) = destroy else {
            return refuse(Code::INVALID_VALUE, "the destructor is null");
        };
        if flags != NO_DESTRUCTOR_SYNC {
            return refuse(Code::INVALID_VALUE, format!("the flags must be 1 (no destructor sync), not {flags:#x}"));
        }
        let handle = handles::fresh();
        give(object, handle as Handle, "the object")?;
        let made = UserObject { handle, data: data as usize, destroy, references: Mutex::new(references.into()) };
        driver()?.user_objects.insert(handle, Arc::new(made));
        Ok(())
    }

    fn cuUserObjectRetain(object: Handle, count: c_uint) {
        refuse_none(count)?;
        driver()?.user_objects.get(object)?.retain(count.into());
        Ok(())
    }

    fn cuUserObjectRelease(object: Handle, count: c_uint) {
        refuse_none(count)?;
        driver()?.user_objects.get(object)?.release(count.into())
    }

    fn cuGraphRetainUserObject(graph: Handle, object: Handle, count: c_uint, flags: c_uint) {
        refuse_none(count)?;
        if flags & !MOVE != 0 {
            return refuse(Code::INVALID_VALUE, format!("the flags must be 0 or 1 (move), not {flags:#x}"));
        }
        let object = driver()?.user_objects.get(object)?;
        graph::with_objects(graph, |objects| {
            if flags & MOVE == 0 {
                object.retain(count.into());
            }
            objects.add(object, count.into());
            Ok(())
        })
    }

    fn cuGraphReleaseUserObject(graph: Handle, object: Handle, count: c_uint) {
        refuse_none(count)?;
        let object = driver()?.user_objects.get(object)?;
        graph::with_objects(graph, |objects| objects.give_back(&object, count.into()))
    }
}
