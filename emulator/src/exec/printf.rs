//! Device-side `printf` and `assert`.

use super::lanes::lanes;
use super::state::{Machine, Warp};
use super::{Fault, FaultKind};

/// Longer strings are cut: nobody prints them, and a wild pointer would otherwise print all of memory.
const MAX_TEXT: usize = 1 << 16;

impl Machine<'_> {
    /// A 64-bit parameter of a call, whose variable is at a constant offset in local memory.
    fn parameter(&self, warp: &mut Warp, operand: u32, lane: u32) -> u64 {
        // SAFETY: `variable` has checked the 8 bytes.
        unsafe { self.variable(warp, operand, lane).cast::<u64>().read_unaligned() }
    }

    /// Where that variable is, with 8 bytes inside local memory.
    fn variable(&self, warp: &mut Warp, operand: u32, lane: u32) -> *mut u8 {
        // SAFETY: the operand is a 64-bit constant, which is a register inside the file.
        let offset = unsafe { warp.file.as_mut_ptr().add(operand as usize).cast::<u64>().read() } as usize;
        let at = lane as usize * self.env.local_stride as usize + offset;
        assert!(at + 8 <= warp.local.len(), "a variable at {offset} of {} bytes", self.env.local_stride);
        // SAFETY: just checked.
        unsafe { warp.local.as_mut_ptr().add(at) }
    }

    /// The bytes of a string up to its NUL.
    fn text(&mut self, warp: &mut Warp, address: u64, lane: u32, pc: u32) -> Result<Vec<u8>, Box<Fault>> {
        let mut text = vec![];
        while text.len() < MAX_TEXT {
            // Wrapping, as in `argument`: no byte at the end of the address space is readable.
            let at = self.readable(warp, address.wrapping_add(text.len() as u64), lane, 1, pc)?;
            // SAFETY: `readable` has checked this byte.
            match unsafe { at.read() } {
                0 => break,
                byte => text.push(byte),
            }
        }
        Ok(text)
    }

    /// `vprintf(format, arguments)`
    pub(super) fn printf(&mut self, warp: &mut Warp, operands: &[u32], pc: u32, active: u32) -> Result<(), Box<Fault>> {
        for lane in lanes(active) {
            let format = self.parameter(warp, operands[1], lane);
            let arguments = self.parameter(warp, operands[2], lane);
            let format = self.text(warp, format, lane, pc)?;
            let (out, count) = self.format(warp, &format, arguments, lane, pc)?;
            self.block.output.extend(out);
            // SAFETY: `variable` has checked 8 bytes, of which the result takes 4.
            unsafe { self.variable(warp, operands[0], lane).cast::<u32>().write_unaligned(count) };
        }
        Ok(())
    }

    /// Formats, and returns the text with the number of arguments used.
    fn format(
        &mut self,
        warp: &mut Warp,
        format: &[u8],
        mut arguments: u64,
        lane: u32,
        pc: u32,
    ) -> Result<(Vec<u8>, u32), Box<Fault>> {
        let mut out = vec![];
        let mut count = 0;
        let mut at = 0;
        while at < format.len() {
            if format[at] != b'%' {
                out.push(format[at]);
                at += 1;
                continue;
            }
            let mut spec = vec![b'%'];
            at += 1;
            let mut long = false;
            let mut conversion = 0;
            while let Some(&c) = format.get(at) {
                at += 1;
                match c {
                    b'-' | b'+' | b' ' | b'#' | b'0'..=b'9' | b'.' => spec.push(c),
                    b'*' => {
                        let width = self.argument(warp, &mut arguments, 4, lane, pc)? as i32;
                        spec.extend(width.to_string().bytes());
                        count += 1;
                    }
                    b'l' | b'j' | b'z' | b't' => long = true,
                    b'h' => spec.push(c),
                    _ => {
                        conversion = c;
                        break;
                    }
                }
            }
            match conversion {
                b'%' => {
                    out.push(b'%');
                    continue;
                }
                b'd' | b'i' | b'u' | b'x' | b'X' | b'o' | b'c' => {
                    let value = self.argument(warp, &mut arguments, if long { 8 } else { 4 }, lane, pc)?;
                    if long {
                        spec.extend(b"ll");
                    }
                    spec.extend([conversion, 0]);
                    // SAFETY: the format has one conversion, of an integer of this width, and ends with NUL.
                    out.extend(print(|to, size| unsafe {
                        if long {
                            libc::snprintf(to, size, spec.as_ptr().cast(), value)
                        } else {
                            libc::snprintf(to, size, spec.as_ptr().cast(), value as u32)
                        }
                    }));
                }
                b'f' | b'F' | b'e' | b'E' | b'g' | b'G' | b'a' | b'A' => {
                    let value = f64::from_bits(self.argument(warp, &mut arguments, 8, lane, pc)?);
                    spec.extend([conversion, 0]);
                    // SAFETY: the format has one conversion, of a double, and ends with NUL.
                    out.extend(print(|to, size| unsafe { libc::snprintf(to, size, spec.as_ptr().cast(), value) }));
                }
                b'p' => {
                    let value = self.argument(warp, &mut arguments, 8, lane, pc)?;
                    out.extend(format!("{value:#x}").bytes());
                }
                b's' => {
                    let address = self.argument(warp, &mut arguments, 8, lane, pc)?;
                    let mut text = self.text(warp, address, lane, pc)?;
                    text.push(0);
                    spec.extend(b"s\0");
                    // SAFETY: the format has one conversion, of a string; both end with NUL.
                    out.extend(print(|to, size| unsafe {
                        libc::snprintf(to, size, spec.as_ptr().cast(), text.as_ptr())
                    }));
                }
                _ => {
                    // As the device's printf does: an unknown conversion is printed as it stands.
                    out.extend(&spec);
                    if conversion != 0 {
                        out.push(conversion);
                    }
                    continue;
                }
            }
            count += 1;
        }
        Ok((out, count))
    }

    /// The next argument, aligned to its size.
    fn argument(
        &mut self,
        warp: &mut Warp,
        arguments: &mut u64,
        bytes: u32,
        lane: u32,
        pc: u32,
    ) -> Result<u64, Box<Fault>> {
        // Wrapping: a wild pointer faults in `readable`. `bytes` is 4 or 8.
        *arguments = arguments.wrapping_add(u64::from(bytes) - 1) & !(u64::from(bytes) - 1);
        let at = self.readable(warp, *arguments, lane, bytes, pc)?;
        *arguments = arguments.wrapping_add(u64::from(bytes));
        // SAFETY: `readable` has checked that many bytes.
        Ok(unsafe {
            if bytes == 8 { at.cast::<u64>().read_unaligned() } else { u64::from(at.cast::<u32>().read_unaligned()) }
        })
    }

    /// `__assertfail(message, file, line, function, size of a character)`
    pub(super) fn assert_fail(&mut self, warp: &mut Warp, operands: &[u32], pc: u32, active: u32) -> Box<Fault> {
        let lane = active.trailing_zeros() & 31;
        let mut texts = [vec![], vec![], vec![]];
        for (text, operand) in texts.iter_mut().zip([0, 1, 3]) {
            let address = self.parameter(warp, operands[operand], lane);
            match self.text(warp, address, lane, pc) {
                Ok(found) => *text = found,
                Err(fault) => return fault,
            }
        }
        let line = self.parameter(warp, operands[2], lane) as u32;
        let [message, file, function] = texts.map(|text| String::from_utf8_lossy(&text).into_owned());
        self.fault(
            FaultKind::Assert,
            warp,
            pc,
            lane,
            format!("{file}:{line}: {function}: assertion `{message}` failed"),
        )
    }
}

/// The output of an `snprintf` call, which is repeated if the buffer was too small.
fn print(call: impl Fn(*mut libc::c_char, usize) -> libc::c_int) -> Vec<u8> {
    let mut buffer = vec![0u8; 128];
    let length = call(buffer.as_mut_ptr().cast(), buffer.len()).max(0) as usize;
    if length >= buffer.len() {
        buffer.resize(length + 1, 0);
        call(buffer.as_mut_ptr().cast(), buffer.len());
    }
    buffer.truncate(length);
    buffer
}
